"""phi3v beside mlx-lm and mlx-vlm: one run, one machine, the same weights, the same prompts and pictures.

    python bench/compare.py --size demo

Every case runs all sides in turn, A B A B, after a first round that does not count, with fresh ids and pixels in each
round, so that no cache of prompts helps anybody. Times are wall-clock times of whole calls. What the sides answer is
not compared: the peers scale positions or join crops differently from Microsoft's code. Writes DIR/SIZE-DEVICE.json,
.md and .svg.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

import phi3v

BLAS = phi3v.fast_blas()  # before the first import of MLX, so that on a CPU every side has the same BLAS

import mlx.core as mx  # noqa: E402
import peers  # noqa: E402
from peers import Ours, Request, Run  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from plot import plot  # noqa: E402

from phi3v.images import SIDE, process  # noqa: E402
from phi3v.model import Config, VisionConfig  # noqa: E402

GPU = mx.default_device() != mx.Device(mx.cpu)
LIMITS = {"max_batch": 128, "max_queue": 512}
KEPT = 4 << 30  # bytes that phi3v may keep of prompts: its cache is on, and leaves the peers their memory
# Phi-3.5-vision's sizes; long prompts, for which its rope has other factors, are not asked here.
PHI = Config(32064, 3072, 8192, 32, 32, 32, 1e-5, 10000.0, 131072, 4096, [1.0] * 48, [1.0] * 48, VisionConfig())
CLIP = VisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
TINY = Config(1024, 192, 384, 2, 4, 4, 1e-5, 10000.0, 131072, 4096, [1.0] * 24, [1.0] * 24, CLIP)


@dataclass
class Size:
    """A model (None: the demo) and the work that is right for it: counts of sequences, tokens and crops."""

    config: Config | None
    dtype: mx.Dtype = mx.float32
    prompts: tuple[int, ...] = (256, 2048)  # tokens of the single prompts
    batches: tuple[int, ...] = (4, 8, 32)
    ragged: tuple[int, int] = (128, 384)  # shortest and longest prompt of a batch
    new: int = 128
    crops: tuple[int, ...] = (1, 5, 17)  # through the tower
    mixed: tuple[int, int] = (32, 64)  # requests at once and tokens of each
    repeats: int = 5
    questions: int = 4  # about pictures at once


# Layers few enough for a CPU. mlx-lm reads a prompt for its keys and values only, so that lazy MLX skips most of the
# last layer: a third of the work with these two layers, a fortieth with all 32.
REAL = replace(PHI, num_hidden_layers=2, vision=VisionConfig(num_hidden_layers=3))
SIZES = {
    "tiny": Size(TINY, mx.float32, (32, 128), (2, 4), (16, 48), 8, (1, 5), (4, 4), 2),
    "demo": Size(
        None, mx.bfloat16 if GPU else mx.float32, batches=(4, 8), new=64, crops=(1, 5), mixed=(8, 32), repeats=3
    ),
    "small": Size(REAL, mx.float32, (128, 512), (4, 8), (32, 96), 8, (1, 5), (2, 8), 3, 2),
    "full": Size(PHI, mx.bfloat16, batches=(4, 8, 32, 128)),
}


class Bench:
    """The models of a size, and the rows that its sections add: a section is a method, a row one side of one case."""

    def __init__(self, size: str):
        self.size, self.rows, self.rng = SIZES[size], [], np.random.default_rng(0)
        mx.random.seed(0)
        self.model = self.config, self.weights = peers.make_weights(self.size.config, self.size.dtype)
        self.ours = Ours(*self.model, **LIMITS, cache_bytes=KEPT)
        self.lm, self.vlm = peers.MlxLm(*self.model), peers.MlxVlm(*self.model)

    def versus(self, section: str, case: str, sides: dict[str, Callable], make: Callable, **extra) -> None:
        """Give every side the same new `make()` in turn, which is what its call takes, and keep what it measured."""
        runs, began = {side: [] for side in sides}, time.perf_counter()
        for done in range(self.size.repeats + 1):
            if done > 3 and (time.perf_counter() - began) / done > 8:
                break  # seconds for a round are dear: three times must do
            work = make()
            for side, call in sides.items():
                runs[side].append(measured(call, work))
        for side, (_, *kept) in runs.items():  # the first warmed up
            values = {metric: [run[metric] for run in kept if metric in run] for metric in kept[0]}
            self.rows.append({"section": section, "case": case, "side": side, "values": values, **extra})
            say(f"{section}, {case}: {side}: " + ", ".join(f"{m} {median(v):.4g}" for m, v in values.items()))

    def one(self) -> None:
        """Text, one sequence: time to first token, and decoding behind a short and a long prompt."""
        sides = {"phi3v": self.ours, "mlx-lm generate_step": self.lm.one, "plain loop": self.lm.plain}
        for n in self.size.prompts:
            timed = {side: reading(call, n) for side, call in sides.items()}
            self.versus("text, one sequence", f"prompt of {n}", timed, lambda n=n: [self.text(n)], n=1)

    def batch(self) -> None:
        """Text, ragged prompts at once. The plain loop gets prompts of one length, the middle of theirs."""
        low, high = self.size.ragged
        for n in self.size.batches:
            lengths = np.random.default_rng(n).integers(low, high + 1, n).tolist(), [(low + high) // 2] * n
            sides = {
                "phi3v": lambda work: self.ours(work[0]),
                "mlx-lm BatchGenerator": lambda work: self.lm.batch(work[0]),
                "plain loop": lambda work: self.lm.plain(work[1]),
            }
            make = lambda lengths=lengths: [[self.text(m) for m in each] for each in lengths]  # noqa: E731
            self.versus("text, ragged", f"{n} sequences", sides, make, n=n)

    def tower(self) -> None:
        """The vision tower alone, on the same crops. TFLOP/s counts the layers whose output is used, on both sides."""

        def timed(call: Callable) -> Callable:
            def run(pixels: mx.array) -> dict[str, float]:
                seconds = clock(lambda: mx.eval(call(pixels)))
                return {"time, s": seconds, "TFLOP/s": len(pixels) * crop_flops(self.config.vision) / seconds / 1e12}

            return run

        def pixels(n: int) -> mx.array:
            made = mx.random.normal((n, 3, SIDE, SIDE), self.weights["lm_head.weight"].dtype)
            mx.eval(made)
            return made

        sides = {side: timed(call) for side, call in peers.towers(*self.model, self.vlm).items()}
        for n in self.size.crops:
            self.versus("vision tower", f"crops: {n}", sides, lambda n=n: pixels(n))

    def pictures(self) -> None:
        """One question about a picture of 2 × 2 crops and a global view, then several at once, each with its own."""
        for n, side in ((1, "generate_step"), (self.size.questions, "BatchGenerator")):
            peer = self.vlm.one if n == 1 else self.vlm.batch
            sides = {"phi3v": self.ours, f"mlx-vlm {side}": peer}
            self.versus("picture questions", f"{n} at once", sides, lambda n=n: [self.picture() for _ in range(n)])

    def mixed(self) -> None:
        """Half pictures, all different, half texts, at once; the serial side has BatchGenerator for the texts only."""
        (n, new), (low, high) = self.size.mixed, self.size.ragged
        lengths = np.random.default_rng(n).integers(low, high + 1, n // 2).tolist()

        def serial(requests: list[Request]) -> dict[str, float]:
            texts, pictures = ([r for r in requests if bool(r.crops) == kind] for kind in (False, True))
            return {"total, s": clock(lambda: (self.lm.batch(texts), self.vlm.one(pictures)))}

        sides = {"phi3v": self.ours, "mlx-lm for the texts, then mlx-vlm picture by picture": serial}
        sides["mlx-vlm BatchGenerator"] = self.vlm.batch
        make = lambda: [r for m in lengths for r in (self.picture(new), self.text(m, new))]  # noqa: E731
        self.versus("mixed", f"{n} requests", sides, make)

    def again(self) -> None:
        """A second question about the same picture, with phi3v's caches and without; are its tokens the same?"""
        fresh, answers = Ours(*self.model, **LIMITS, cache_bytes=0), {}

        def asked(engine: Ours, work: list[Request]) -> dict[str, float]:
            first, second = (engine([request]) for request in work)
            answers[engine] = second.tokens[0]
            same = np.mean(np.equal(answers[engine], answers[fresh]))
            found = {f"question {k}, first token, s": run.times[0][0] for k, run in ((1, first), (2, second))}
            return found | {"second / first": second.times[0][0] / first.times[0][0], "equal tokens": float(same)}

        def make() -> list[Request]:
            first = self.picture()
            return [first, replace(first, ids=first.ids[:-16] + self.text(16).ids)]

        sides = {"phi3v without caches": lambda w: asked(fresh, w), "phi3v": lambda w: asked(self.ours, w)}
        self.versus("second question", "same picture", sides, make)
        fresh.engine.close()

    def threads(self) -> None:
        """The module's own call from 16 threads beside 16 in a row, and a text that comes during a long prompt."""
        if self.size.config:
            return say("threads: only the demo has a tokenizer")
        with peers.language_models() as (llm, plain), ThreadPoolExecutor(16) as pool:

            def ask(work: tuple, model=llm) -> str:
                return model.generate(work[1], images=[work[0]], max_tokens=24)

            def first(work: tuple) -> float:
                time.sleep(work[1])
                with llm.stream(work[0], max_tokens=4) as deltas:
                    return clock(lambda: next(deltas))

            def late(prompts: list[str]) -> dict[str, float]:
                return dict(
                    zip(("long, first token, s", "short, first token, s"), pool.map(first, prompts), strict=True)
                )

            sides = {
                "phi3v": lambda work: {"total, s": clock(lambda: list(pool.map(ask, work)))},
                "phi3v in a row, no caches": lambda work: {"total, s": clock(lambda: [ask(w, plain) for w in work])},
            }
            for n in (1, 16):
                self.versus("16 threads", f"pictures: {n}", sides, lambda n=n: drawings(self.rng, n))
            make = lambda: [(digits(self.rng, 1980), 0), (digits(self.rng, 16), 0.03)]  # noqa: E731
            self.versus("late text", "30 ms after a prompt of about 2,000", {"phi3v": late}, make)

    def text(self, length: int, new: int | None = None) -> Request:
        """A text request of random ids, never the same twice."""
        return Request(self.rng.integers(3, self.config.vocab_size, length).tolist(), new or self.size.new)

    def picture(self, new: int | None = None) -> Request:
        """A question about a picture of noise: 4 crops and the global view, 8 ids before and 16 behind."""
        noise = self.rng.integers(0, 256, (2 * SIDE, 2 * SIDE, 3), np.uint8)
        crops, words = process(Image.fromarray(noise), 4), self.text(24).ids
        return Request(words[:8] + [-1] * crops.tokens + words[8:], new or self.size.new, crops)


def say(line: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {line}", file=sys.stderr, flush=True)


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def clock(call: Callable) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measured(call: Callable, work) -> dict[str, float]:
    """What one call measured, and the most memory it had beyond what was there when it began."""
    time.sleep(0.05 if GPU else 0.3)  # let an engine that works ahead come to rest
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    result = call(work)
    values = result.metrics() if isinstance(result, Run) else result
    return values | {"memory, GB": max(0, mx.get_peak_memory() - before) / 1e9}


def reading(call: Callable, length: int) -> Callable:
    """A call for one prompt, with the speed of reading it."""

    def run(requests: list[Request]) -> dict[str, float]:
        found = call(requests).metrics()
        return {"prefill, tok/s": length / found["first token, s"], **found}

    return run


def crop_flops(vision: VisionConfig) -> float:
    """Multiplications and additions of one crop through the tower's used layers."""
    width, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    n = patches + 1
    layer = 2 * n * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * n * n * width
    return layer * vision.layers_used + 2 * patches * width * vision.num_channels * vision.patch_size**2


def drawings(rng: np.random.Generator, pictures: int) -> list[tuple[Image.Image, str]]:
    """Sixteen (picture, question): coloured shapes on white, so many of them different."""
    made = []
    for i in range(pictures):
        made.append(Image.new("RGB", (480, 360), "white"))
        box = [*rng.integers(20, 160, 2).tolist(), *rng.integers(200, 340, 2).tolist()]
        draw = ImageDraw.Draw(made[-1])
        (draw.ellipse, draw.rectangle)[i % 2](box, fill=tuple(rng.integers(0, 200, 3).tolist()))
    return [(made[i % pictures], f"What is shown in this image? ({i})") for i in range(16)]


def digits(rng: np.random.Generator, length: int) -> str:
    return "".join(map(str, rng.integers(0, 10, length).tolist()))


def machine() -> dict:
    """What ran this: device, system, BLAS, versions."""
    versions = {name: version(name) for name in ("mlx", "mlx-lm", "mlx-vlm", "numpy")}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    versions |= {"phi3v": f"{phi3v.__version__} {commit}".strip(), "python": platform.python_version()}
    device = mx.device_info().get("device_name", "unknown") + ("" if GPU else " CPU")
    return {"device": device, "system": platform.platform(), "blas": None if GPU else BLAS, "versions": versions}


def tables(result: dict) -> str:
    """The Markdown of a result: a table for each section, medians, and phi3v's advantage over each peer."""
    about = [result["device"], result["date"][:10], *(f"{k} {v}" for k, v in result["versions"].items())]
    lines = [
        f"# {result['size']}: {', '.join(about)}",
        f"\n`{result['command']}`, {result['weights_gb']:.2f} GB weights",
    ]
    lines += [
        "\nMedians; in brackets how many times better phi3v is (over 1: phi3v is). Memory: beyond what was there."
    ]
    for section in dict.fromkeys(row["section"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["section"] == section]
        sides = list(dict.fromkeys(row["side"] for row in rows))
        lines += [f"\n## {section}", f"| case | measured | {' | '.join(sides)} |", "|---|---|" + "---|" * len(sides)]
        for case in dict.fromkeys(row["case"] for row in rows):
            values = {row["side"]: row["values"] for row in rows if row["case"] == case}
            for metric in dict.fromkeys(metric for side in values.values() for metric in side):
                found = {side: values.get(side, {}).get(metric, []) for side in sides}
                cells = [cell(metric, found["phi3v"], found[side], side != "phi3v") for side in sides]
                lines.append(f"| {case} | {metric} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(metric: str, ours: list[float], theirs: list[float], peer: bool) -> str:
    """A median; for a peer the median of the rounds' ratios, too."""
    if not theirs:
        return "–"
    better = ""
    if peer and all(ours + theirs) and len(ours) == len(theirs) and metric != "equal tokens":
        pairs = zip(ours, theirs, strict=True)
        better = f" ({median([a / b if metric.endswith('/s') else b / a for a, b in pairs]):.2f})"
    return f"{median(theirs):.4g}{better}"


def main() -> None:
    sections = ["one", "batch", "tower", "pictures", "mixed", "again", "threads"]
    parser = argparse.ArgumentParser(description="phi3v beside mlx-lm and mlx-vlm")
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--only", nargs="+", choices=sections, default=sections, metavar="SECTION", help=str(sections))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options, began = parser.parse_args(), time.perf_counter()
    result = {"size": options.size, "date": datetime.now(UTC).isoformat(), "command": "", **machine()}
    only = f" --only {' '.join(options.only)}" if options.only != sections else ""
    result["command"] = f"python bench/compare.py --size {options.size}{only}"
    path = options.out / f"{options.size}-{'-'.join(result['device'].lower().split())}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.size)
    result |= {"weights_gb": sum(w.nbytes for w in bench.weights.values()) / 1e9, "rows": bench.rows}
    for section in options.only:
        getattr(bench, section)()
        mx.clear_cache()
        result["seconds"] = time.perf_counter() - began
        path.write_text(json.dumps(result, indent=1))  # after each section: what was measured is not lost
        path.with_suffix(".md").write_text(tables(result))
    bench.ours.engine.close()
    plot(path)
    say(f"{path} after {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()

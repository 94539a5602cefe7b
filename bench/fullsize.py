"""Phi-3.5-vision at full size: written as Hugging Face has it, served over HTTPS, asked, quantised and served again.

    python bench/fullsize.py                 # two CPU cores take minutes, 18 GB of memory and 12 GB of disk
    python bench/fullsize.py --layers 2      # a trial of two language and three vision layers
    python bench/fullsize.py --ranks 2       # and `serve --tensor-parallel` on two GPUs, or two processes of a CPU

The weights are random: what is said means nothing, what it takes is as with the real ones. Every answer comes from a
`phi3v serve` of its own in a temporary folder, with a key of `phi3v create` and the certificate verified. The floor of
decoding is one reading of the language model's weights for each token, at the speed that a copy of a gigabyte has here
(bytes read and written, all cores). Writes DIR/fullsize-DEVICE.md and .json.
"""

import argparse
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from http.client import HTTPSConnection
from io import BytesIO
from pathlib import Path
from statistics import median

import numpy as np

import phi3v

BLAS = phi3v.fast_blas()  # before the first import of MLX

import mlx.core as mx  # noqa: E402
from memory import PHI, SHARD  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from PIL import Image  # noqa: E402

from phi3v.llm import DEMO  # noqa: E402
from phi3v.model import PATCH_WEIGHT, Config, Phi3V, VisionConfig, load  # noqa: E402

GPU = mx.default_device() != mx.Device(mx.cpu)
PHI3V = [sys.executable, "-m", "phi3v"]
ROUNDS, NEW = (4, 128) if GPU else (1, 8)  # of each question, the first of several not counted; tokens of an answer
TOWER = "model.vision_embed_tokens.img_processor.vision_model."
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXT, SEEN = "Why is the sky blue?", "What is shown in this image?"
SPARE = 2_000_000_000  # bytes of disk, and of memory beside the weights


def write(folder: Path, config: Config, trial: bool) -> None:
    """A checkpoint as Microsoft's: names, shapes, types, shards, and the tower's last layer, which nothing reads."""
    shapes = {name: like.shape for name, like in tree_flatten(Phi3V(config).parameters())}  # lazy: nothing is allocated
    for n in range(config.vision.layers_used, config.vision.num_hidden_layers):
        first, own = f"{TOWER}encoder.layers.0.", f"{TOWER}encoder.layers.{n}."
        shapes |= {name.replace(first, own): shape for name, shape in shapes.items() if name.startswith(first)}
    shapes |= {f"{TOWER}post_layernorm.{part}": (config.vision.hidden_size,) for part in ("weight", "bias")}
    shards: list[dict[str, tuple]] = [{}]
    for name, shape in shapes.items():
        if 2 * sum(map(np.prod, shards[-1].values())) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    files = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {name: random_weight(name, shape) for name, shape in shard.items()}
        mx.save_safetensors(str(folder / file), tensors, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, file)
        del tensors
        mx.clear_cache()
        say(f"wrote {file}")
    index = {"metadata": {"total_size": int(2 * sum(map(np.prod, shapes.values())))}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    describe(folder, config, trial)


def random_weight(name: str, shape: tuple) -> mx.array:
    """Norms of 1, and elsewhere what keeps activations near 1: a standard deviation of 0.02. Evaluated."""
    norm = name.endswith("weight") and "norm" in name.split(".")[-2]
    array = mx.ones(shape, mx.bfloat16) if norm else mx.random.uniform(-0.035, 0.035, shape, mx.bfloat16)
    if name == PATCH_WEIGHT:
        array = mx.contiguous(array.moveaxis(-1, 1))  # as torch has it
    mx.eval(array)
    return array


def describe(folder: Path, config: Config, trial: bool) -> None:
    """The files beside the weights: the demo's with these sizes, 4 crops, and a word for every id."""
    raw = json.loads((DEMO / "config.json").read_bytes())
    raw |= {name: value for name, value in vars(config).items() if name in raw}
    raw["rope_scaling"] |= {name: getattr(config, name) for name in ("short_factor", "long_factor")}
    # Microsoft's says no sizes of the tower: they are CLIP ViT-L/14-336's.
    raw["img_processor"] = {"image_dim_out": 1024, "layer_idx": -2, "name": "clip_vision_model", "num_img_tokens": 144}
    raw["img_processor"] |= {"num_hidden_layers": config.vision.num_hidden_layers} if trial else {}
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    raw = json.loads((DEMO / "preprocessor_config.json").read_bytes()) | {"num_crops": 4}
    (folder / "preprocessor_config.json").write_text(json.dumps(raw, indent=2))
    raw = json.loads((DEMO / "tokenizer.json").read_bytes())
    taken = {*raw["model"]["vocab"].values(), *(token["id"] for token in raw["added_tokens"])}
    raw["model"]["vocab"] |= {f"▁w{i}": i for i in range(config.vocab_size) if i not in taken}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    shutil.copy(DEMO / "tokenizer_config.json", folder)


class Served:
    """`phi3v serve` and a key for it: asks over HTTPS, and knows when it was ready and the most memory it has had."""

    def __init__(self, model: Path, home: Path, ranks: int = 1):
        made = subprocess.run([*PHI3V, "create", "--name", "fullsize"], cwd=home, stdout=subprocess.PIPE, check=True)
        self.key, began = made.stdout.decode().strip(), time.perf_counter()
        command = [*PHI3V, "serve", "--port", "0", "--model", str(model)]
        if ranks > 1:
            launcher = str(Path(sys.executable).with_name("mlx.launch"))
            command = [launcher, "-n", str(ranks), "--", *command, "--tensor-parallel"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=home, start_new_session=True, **pipes)
        greeting = next((line for line in self.process.stdout if "answers at" in line), None)
        if not greeting:
            sys.exit(f"`phi3v serve` ended with status {self.process.wait()}: what it said is above")
        self.ready, self.port = time.perf_counter() - began, int(greeting.rpartition(":")[2])
        self.trust = ssl.create_default_context(cafile=home / "server.crt")

    def post(self, route: str, body: dict) -> Iterator[str]:
        """The lines of an answer."""
        connection = HTTPSConnection("localhost", self.port, context=self.trust, timeout=600)
        headers = {"Content-Type": "application/json", "X-API-Key": self.key}
        connection.request("POST", route, json.dumps(body), headers)
        reply = connection.getresponse()
        if reply.status != 200:
            sys.exit(f"{route} answered {reply.status}: {reply.read().decode()}")
        yield from (line.decode() for line in reply)
        connection.close()

    def stream(self, route: str, body: dict) -> tuple[float, float]:
        """Seconds from the question to the first token, and tokens a second from then on."""
        began, moments, made = time.perf_counter(), [], 0
        for line in self.post(route, body | {"stream": True, "stream_options": {"include_usage": True}}):
            event = json.loads(line[6:]) if line.startswith("data: {") else {}
            if "error" in event:
                sys.exit(f"{route} ended with {event['error']}")
            for choice in event.get("choices", ()):  # a token that is no text shows at the end only
                if choice.get("text") or choice.get("delta", {}).get("content") or choice["finish_reason"]:
                    moments.append(time.perf_counter())
            made = (event.get("usage") or {}).get("completion_tokens", made)
        return moments[0] - began, (made - 1) / max(moments[-1] - moments[0], 1e-9)

    def stop(self) -> int:
        threads = Path("/proc", str(self.process.pid), "task").glob("*/children") if sys.platform == "linux" else ()
        below = [int(pid) for thread in threads for pid in thread.read_text().split()]  # the ranks that mlx.launch has
        peak = max(map(most_resident, [self.process.pid, *below]))
        os.killpg(self.process.pid, signal.SIGINT)  # mlx.launch ends as by Ctrl-C
        if self.process.wait(120) != 0 and not below:
            sys.exit(f"`phi3v serve` ended with status {self.process.returncode}")
        return peak


def asked(model: Path, home: Path, ranks: int = 1) -> dict[str, float]:
    """What a server of a folder took to start, to answer on both routes with pictures and without, and of memory."""
    server, rng = Served(model, home, ranks), np.random.default_rng(0)
    say(f"{model.name} is ready after {server.ready:.1f} s")
    try:
        found: dict[str, list[float]] = defaultdict(list)
        for _ in range(ROUNDS):
            said = [{"type": "text", "text": SEEN}, {"type": "image_url", "image_url": {"url": picture(rng)}}]
            crops = {"prompt": SEEN, "images": [picture(rng)], "num_crops": 1}
            for name, route, body in (
                ("picture of 4 crops", CHAT, {"messages": [{"role": "user", "content": said}]}),
                ("picture of 1 crop", COMPLETIONS, crops),
                ("text", COMPLETIONS, {"prompt": TEXT}),
            ):
                first, rate = server.stream(route, body | {"max_tokens": NEW})
                say(f"{model.name}, {name}: first token after {first:.3g} s, then {rate:.3g} tok/s")
                found[f"{name}, first token, s"].append(first)
                found[f"{name}, decode, tok/s"].append(rate)
        reply = json.loads("".join(server.post(COMPLETIONS, {"prompt": [TEXT, "What is 3 + 4?"], "max_tokens": 4})))
        assert len(reply["responses"]) == 2 and reply["system_fingerprint"] == model.name
    except BaseException:
        os.killpg(server.process.pid, signal.SIGKILL)
        raise
    medians = {name: median(values[1:] or values) for name, values in found.items()}
    return {"ready to answer, s": server.ready} | medians | {"peak resident memory, GB": server.stop() / 1e9}


def picture(rng: np.random.Generator) -> str:
    """A PNG of coloured squares as large as 2 × 2 crops, as a data: URL: never the same twice."""
    squares = rng.integers(0, 256, (14, 14, 3), np.uint8).repeat(48, 0).repeat(48, 1)
    Image.fromarray(squares).save(png := BytesIO(), "PNG")
    return f"data:image/png;base64,{b64encode(png.getvalue()).decode()}"


def most_resident(pid: int) -> int:
    """The most bytes that a process has had in memory, 0 if it has just ended."""
    try:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    except (OSError, TypeError):
        return 0


def quantized(source: Path, out: Path) -> dict[str, float]:
    """What `phi3v quantize` took and said."""
    began, peak = time.perf_counter(), 0
    command = [*PHI3V, "quantize", str(source), str(out), "--bits", "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, most_resident(process.pid))
            time.sleep(0.1)
        printed = process.stdout.read()
    if process.returncode:
        sys.exit(f"`phi3v quantize` ended with status {process.returncode}")
    say(printed.strip())
    same, places = map(int, re.search(r"at (\d+) of (\d+) places", printed).groups())
    seconds = {"quantising and comparing, s": time.perf_counter() - began, "its peak memory, GB": peak / 1e9}
    return seconds | {"greedy agreement, %": 100 * same / places}


def benched(model: Path) -> list[dict]:
    """The rows of `phi3v bench`."""
    say(f"phi3v bench --model {model.name}")
    done = subprocess.run([*PHI3V, "bench", "--model", str(model), "--json"], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)["rows"]


def bandwidth() -> float:
    """Bytes a second of a copy, read and written: the best of five."""
    if GPU:
        source = mx.ones((1 << 30,), mx.bfloat16)
        mx.eval(source)
        best, size = min(clock(lambda: mx.eval(source + 1)) for _ in range(5)), source.nbytes
        mx.clear_cache()
        return 2 * size / best
    cores = os.cpu_count() or 1
    source, target = (np.ones((cores, (1 << 28) // cores), np.float32) for _ in range(2))
    with ThreadPoolExecutor(cores) as pool:
        best = min(clock(lambda: [*pool.map(np.copyto, target, source)]) for _ in range(5))
    return 2 * source.nbytes / best


def clock(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def sizes(folder: Path) -> dict[str, float]:
    """Of a checkpoint: on disk, and in memory as this device keeps it, without being read."""
    kept = {name: array.nbytes for name, array in tree_flatten(load(folder, lazy=True).parameters())}
    language = sum(size for name, size in kept.items() if "vision" not in name)
    disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"files, GB": disk / 1e9, "weights in memory, GB": sum(kept.values()) / 1e9, "language": language / 1e9}


def table(result: dict) -> str:
    """The Markdown of a result: what was measured, one column for each checkpoint."""
    about = [
        result["device"],
        result["date"][:10],
        *(f"{name} {number}" for name, number in result["versions"].items()),
    ]
    lines = [
        f"# fullsize: {', '.join(about)}",
        f"\n`{result['command']}`: {result['parameters'] / 1e9:.2f} B parameters",
    ]
    lines += [f"\nFloor: {result['bandwidth'] / 1e9:,.1f} GB/s of a copy / the language model's weights."]
    lines += [f"\n| measured | {' | '.join(result['models'])} |", "|---|" + "--:|" * len(result["models"])]
    columns = [*result["models"].values()]
    for name in dict.fromkeys(name for column in columns for name in column if name != "bench"):
        lines.append(f"| {name} | " + " | ".join(f"{c[name]:,.4g}" if name in c else "–" for c in columns) + " |")
    benches = [{row["name"]: row for row in column.get("bench", ())} for column in columns]
    for name in dict.fromkeys(name for rows in benches for name in rows):
        cells = [f"{rows[name]['value']:,.4g} {rows[name]['unit']}" if name in rows else "–" for rows in benches]
        lines.append(f"| `phi3v bench`: {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@contextmanager
def clean(keep: Path | None) -> Iterator[Path]:
    """The folder for both checkpoints, which goes away unless it is to be kept."""
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="phi3v-fullsize-") as folder:
        yield Path(folder)


def need_room(place: Path, weights: int) -> None:
    """Refuse a machine on which this would end in the middle; a CPU keeps float32, twice the file's bytes."""
    if (free := shutil.disk_usage(place).free) < 1.4 * weights + SPARE:
        sys.exit(f"{place} has {free / 1e9:.0f} GB free, {(1.4 * weights + SPARE) / 1e9:.0f} are needed: name a --keep")
    free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    if not GPU and free < 2 * weights + SPARE:
        sys.exit(
            f"{free / 1e9:.0f} GB of memory are free, {(2 * weights + SPARE) / 1e9:.0f} are needed: try --layers 2"
        )


def say(line: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {line}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="of the language model, with three of the tower: for a trial")
    parser.add_argument("--bench", action="store_true", help="`phi3v bench` on a CPU, too: many minutes at full size")
    parser.add_argument("--ranks", type=int, default=1, help="serve the first checkpoint on so many ranks, too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the checkpoints are made, and stay")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given, config = parser.parse_args(), PHI
    mx.random.seed(0)
    if given.layers:
        config = replace(PHI, num_hidden_layers=given.layers, vision=VisionConfig(num_hidden_layers=3))
    parameters = sum(like.size for _, like in tree_flatten(Phi3V(config).parameters()))
    device = mx.device_info().get("device_name", "unknown") + ("" if GPU else " CPU")
    versions = {"mlx": mx.__version__, "phi3v": phi3v.__version__, "python": sys.version.split()[0]}
    result = {"date": datetime.now(UTC).isoformat(), "device": device, "blas": None if GPU else BLAS, "models": {}}
    result |= {"versions": versions, "command": f"python bench/{Path(__file__).name}", "parameters": parameters}
    result["command"] += f" --layers {given.layers}" if given.layers else ""
    result["command"] += f" --ranks {given.ranks}" if given.ranks > 1 else ""
    path = given.out / f"fullsize-{'-'.join(device.lower().split())}.json"
    given.out.mkdir(parents=True, exist_ok=True)
    with clean(given.keep) as folder, tempfile.TemporaryDirectory() as home:
        need_room(folder, 2 * parameters)
        result["bandwidth"] = bandwidth()
        say(f"a copy: {result['bandwidth'] / 1e9:.1f} GB/s")
        for name in ("bf16", "4 bits"):
            model = folder / f"phi-3.5-random-{name.replace(' ', '')}"
            if name == "bf16":
                model.mkdir()
                began = time.perf_counter()
                write(model, config, bool(given.layers))
                found = {"writing, s": time.perf_counter() - began}
            else:
                found = quantized(folder / "phi-3.5-random-bf16", model)
            found |= sizes(model) | asked(model, Path(home))
            found["floor of decode, tok/s"] = result["bandwidth"] / 1e9 / found.pop("language")
            if GPU or given.bench:
                found["bench"] = benched(model)
            result["models"][name] = found
            if name == "bf16" and given.ranks > 1:
                result["models"][f"{name}, {given.ranks} ranks"] = asked(model, Path(home), given.ranks)
            path.write_text(json.dumps(result, indent=1))  # after each: what was measured is not lost
            path.with_suffix(".md").write_text(table(result))
    print(table(result))
    say(f"{path}")


if __name__ == "__main__":
    main()

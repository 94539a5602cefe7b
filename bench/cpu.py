"""On a CPU, the first token of a question about a picture: phi3v beside mlx-vlm as each comes, from the same weights.

    python bench/cpu.py                     # --size demo small, --weights "bf16" "4 bits", --repeats 3

bench/compare.py gives all sides OpenBLAS, since they share its process; here each has a process of its own, so that
mlx-vlm has the BLAS of MLX's wheel and the type of the file, as its users do. The weights are the embedded model's, and
random ones of Phi-3.5-vision's widths with two and three layers: in bf16, as checkpoints are, and in 4 bits. Sides take
turns with the same pictures of 2 × 2 crops and the global one. Writes DIR/cpu-DEVICE.md and .json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

SIDES = {  # name: does it have OpenBLAS
    "phi3v": ("ours", "1"),
    "phi3v without OpenBLAS": ("ours", "0"),
    "mlx-vlm": ("theirs", "0"),
}


def child(side: str, folder: Path) -> None:
    """Say that the model is there; then answer each line, a seed, with the seconds until the first token, by the clock
    and of all cores: the second depends less on what else the machine does."""
    import phi3v

    phi3v.fast_blas()  # unless PHI3V_BLAS=0
    import mlx.core as mx
    import peers
    from PIL import Image

    from phi3v.engine import Engine, Prompt
    from phi3v.images import SIDE, process
    from phi3v.model import Config, load, read, weight_files

    config = Config.read(folder)
    if side == "ours":
        engine = Engine(lambda: load(folder), max_batch=8, max_queue=64, cache_bytes=0)
        engine.wait()
    else:
        weights = {name: x for path in weight_files(folder) for name, x in read(path).items()}
        peer = peers.MlxVlm(config, weights).one
    print("ready", flush=True)
    for line in sys.stdin:
        rng = np.random.default_rng(int(line))
        crops = process(Image.fromarray(rng.integers(0, 256, (2 * SIDE, 2 * SIDE, 3), np.uint8)), 4)
        words = rng.integers(3, config.vocab_size, 24).tolist()
        ids = words[:8] + [-1] * crops.tokens + words[8:]
        mx.synchronize()
        began, used = time.perf_counter(), time.process_time()
        if side == "ours":
            next(iter(engine.submit([Prompt(ids, [crops], 1)])))
        else:
            peer([peers.Request(ids, 1, crops)])
        print(time.perf_counter() - began, time.process_time() - used, flush=True)


def folders(size: str, made: Path) -> dict[str, Path]:
    """The checkpoint of a size in bf16 and in 4 bits."""
    import mlx.core as mx
    import peers
    from compare import REAL

    from phi3v.quantize import quantize

    source = peers.DEMO
    if size == "small":
        source = made / size
        source.mkdir()
        peers.write_folder(*peers.make_weights(REAL, mx.bfloat16), source)
    quantize(source, made / f"{size}-4", 4, 64, False)
    return {"bf16": source, "4 bits": made / f"{size}-4"}


def measure(folder: Path, repeats: int) -> dict[str, list[list[float]]]:
    """Each side's seconds in turn, by the clock and of all cores; the first round does not count."""
    command, running = [sys.executable, __file__, "--child"], {}
    for name, (side, blas) in SIDES.items():
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        running[name] = subprocess.Popen([*command, side, str(folder)], env=os.environ | {"PHI3V_BLAS": blas}, **pipes)
        assert running[name].stdout.readline() == "ready\n"
    times: dict[str, list[list[float]]] = {name: [] for name in running}
    for seed in range(repeats + 1):
        for name, process in running.items():
            print(seed, file=process.stdin, flush=True)
            times[name].append([float(word) for word in process.stdout.readline().split()])
            print(f"{datetime.now():%H:%M:%S} {name}: {times[name][-1]}", file=sys.stderr, flush=True)
    for process in running.values():
        process.communicate()
    return {name: some[1:] for name, some in times.items()}


def table(rows: dict[str, dict[str, list[list[float]]]]) -> str:
    """Medians of seconds, and in brackets those of the rounds' ratios to phi3v: with OpenBLAS, and without."""
    lines = [f"| seconds, then of all cores | {' | '.join(SIDES)} |", "|---|" + "---|" * len(SIDES)]
    for case, sides in rows.items():
        for kind, what in enumerate((case, f"{case}, all cores")):
            times = {name: np.array(some)[:, kind] for name, some in sides.items()}
            ours, slow = times["phi3v"], times["phi3v without OpenBLAS"]
            cells = [f"{np.median(some):.3g}" for some in times.values()]
            cells[-1] += f" (**{np.median(times['mlx-vlm'] / ours):.1f}**; {np.median(times['mlx-vlm'] / slow):.1f})"
            lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="the first token of a question about a picture, on a CPU")
    parser.add_argument("--size", nargs="+", choices=("demo", "small"), default=["demo", "small"])
    parser.add_argument("--weights", nargs="+", choices=("bf16", "4 bits"), default=["bf16", "4 bits"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options, rows = parser.parse_args(), {}
    from compare import machine

    about = machine()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"cpu-{'-'.join(about['device'].lower().split())}.json"
    with tempfile.TemporaryDirectory() as made:
        for size in options.size:
            found = folders(size, Path(made))
            for weights, folder in [(name, found[name]) for name in options.weights]:
                rows[f"{size}, {weights}"] = measure(folder, options.repeats)
                path.write_text(json.dumps(about | {"date": datetime.now(UTC).isoformat(), "rows": rows}, indent=1))
                path.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    child(sys.argv[2], Path(sys.argv[3])) if sys.argv[1:2] == ["--child"] else main()

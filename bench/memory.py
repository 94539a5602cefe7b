"""What a model takes of a machine's memory: computed for Macs by the engine's own rules, allocated and loaded here.

    python bench/memory.py                     the table of BENCHMARKS.md
    python bench/memory.py --check             allocate: what a picture takes beside the weights; a whole 4-bit model
    python bench/memory.py --write DIR --bits 4 --layers 32      random weights in DIR, sharded as checkpoints are
    python bench/memory.py --load DIR          in a process of its own: seconds and peak, beside reading the files

Random weights of Phi-3.5-vision's sizes; nothing is downloaded.
"""

import argparse
import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import phi3v

phi3v.fast_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from phi3v.engine import SHARE, Engine, room_for, token_bytes  # noqa: E402
from phi3v.images import SIDE, Crops, token_count  # noqa: E402
from phi3v.model import Config, Phi3V, VisionConfig, load, weight_files  # noqa: E402
from phi3v.sequences import Prompt  # noqa: E402

PHI = Config(32064, 3072, 8192, 32, 32, 32, 1e-5, 10000.0, 131072, 4096, [1.0] * 48, [1.0] * 48, VisionConfig())
FEW = replace(PHI, num_hidden_layers=2, vision=VisionConfig(num_hidden_layers=3))
GRIDS = {1: (1, 1), 4: (2, 2), 16: (4, 4)}  # crops of a picture
KINDS = {"4 bits": (4, True), "4 bits, the tower 16": (4, False), "8 bits": (8, True), "16 bits": (16, True)}
# A picture's features, one piece of a prompt and logits: --check with 1, 4 and 16 crops, float32, less the KV cache. A
# GPU's bfloat16 needs half, and its attention writes no scores: these are bounds.
WORK = {0: 0.3e9, 1: 0.2e9, 4: 0.2e9, 16: 0.6e9}
QUESTION, ANSWER = 64, 512  # tokens beside the picture's
GPU_SHARE = 2 / 3  # of a Mac's memory: what Metal lets the GPU have at least
SHARD = 1_000_000_000


def model_of(config: Config, bits: int, pictures: bool = True) -> Phi3V:
    """Nothing is allocated until it is evaluated."""
    model = Phi3V(config)

    def chosen(path: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and (pictures or "vision" not in path)

    if bits < 16:
        nn.quantize(model, 64, bits, class_predicate=chosen)
    return model


def weights_of(bits: int, pictures: bool) -> int:
    """Bytes of the weights with floats of 16 bits."""
    arrays = [array for _, array in tree_flatten(model_of(PHI, bits, pictures).parameters())]
    return sum(2 * a.size if mx.issubdtype(a.dtype, mx.floating) else a.nbytes for a in arrays)


def table() -> None:
    """Context, and how many may run at once: texts of 512 tokens, questions about a picture of 1, 4 and 16 crops."""
    lengths = {0: 512 + ANSWER} | {c: token_count(*grid) + QUESTION + ANSWER for c, grid in GRIDS.items()}
    print("| weights | GB | " + " | ".join(f"{gb} GB" for gb in (8, 16, 32)) + " | peak, 1 picture of 4 crops |")
    print("|---|---|" + "---|" * 4)
    for kind, choice in KINDS.items():
        weights, cells = weights_of(*choice), []
        for memory in (8 << 30, 16 << 30, 32 << 30):
            _, room = room_for(PHI, weights, 2, int(memory * SHARE))
            fits = {c: weights + n * token_bytes(PHI, 2) + WORK[c] <= memory * GPU_SHARE for c, n in lengths.items()}
            counts = [max(1, int(room // (1.25 * n))) if fits[c] else 0 for c, n in lengths.items()]
            short = min(room, PHI.max_position_embeddings)
            cells.append(f"{short:,}: {' · '.join(map(str, counts))}" if any(counts) else "does not fit")
        peak = weights + lengths[4] * token_bytes(PHI, 2) + WORK[4]
        print(f"| {kind} | {weights / 1e9:.2f} | " + " | ".join(cells) + f" | {peak / 1e9:.2f} GB |")


def fill(model: Phi3V) -> Phi3V:
    """Random numbers for weights, in the kept types."""
    for name, like in tree_flatten(model.parameters()):
        if mx.issubdtype(like.dtype, mx.floating):
            array = mx.random.normal(like.shape, like.dtype, scale=0.02)
        else:
            array = mx.random.randint(0, 1 << 31, like.shape).astype(like.dtype)
        mx.eval(array)
        model.load_weights([(name, array)], strict=False)
    for layer in model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers:
        layer.self_attn.fuse()
    mx.eval(model.parameters())
    return model


def peak_of(engine: Engine, crops: int, new: int) -> tuple[int, int]:
    """Peak bytes above what lay there before a question (crops 0: a text of 2,048 tokens), and its tokens."""
    rng, pictures, ids = np.random.default_rng(0), [], [5] * 2048
    if crops:
        grid = GRIDS[crops]
        pixels = rng.standard_normal((1 + grid[0] * grid[1], 3, SIDE, SIDE), dtype=np.float32)
        pictures = [Crops(pixels, grid, -1)]
        ids = [1] + [-1] * pictures[0].tokens + [5] * QUESTION
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    list(engine.submit([Prompt(ids, pictures, new)]))
    return mx.get_peak_memory() - before, len(ids) + new


def check() -> None:
    engine = Engine(lambda: fill(model_of(FEW, 16)), cache_bytes=0)
    engine.wait()
    for crops in (0, *GRIDS):
        peak, tokens = peak_of(engine, crops, 4)
        work = peak - tokens * token_bytes(FEW, 4)
        print(f"{crops} crops, {tokens} tokens: {peak / 1e6:.0f} MB, {work / 1e6:.0f} MB of it no KV cache", flush=True)
        assert work <= WORK[crops], "more than the table says"
    engine.close()
    # The layers that are not run lie in memory all the same: one of each does the same work in the same room.
    kept, one = [], replace(PHI, num_hidden_layers=1)

    def whole() -> Phi3V:
        model = fill(model_of(PHI, 4))
        tower = model.model.vision_embed_tokens.img_processor.vision_model.encoder
        kept.extend([model.model.layers[1:], tower.layers[1:]])
        model.model.layers, tower.layers = model.model.layers[:1], tower.layers[:1]
        model.config = one
        return model

    engine = Engine(whole, cache_bytes=0)
    engine.wait()
    weights, began = mx.get_active_memory(), time.perf_counter()
    peak, tokens = peak_of(engine, 4, 2)
    rest = tokens * (token_bytes(PHI, 4) - token_bytes(one, 4))
    total = weights + peak + rest
    engine.close()
    parts = f"{weights / 1e9:.2f} of weights, {peak / 1e9:.2f} beside them, {rest / 1e9:.2f} of KV in layers not run"
    print(f"4 bits, 4 crops, float32: {total / 1e9:.2f} GB: {parts} ({time.perf_counter() - began:.0f} s)")
    assert total <= 4e9


def write(folder: Path, bits: int, layers: int) -> None:
    factors = {name: [1.0] * 48 for name in ("short_factor", "long_factor")}
    raw = {k: v for k, v in vars(PHI).items() if k not in ("vision", *factors)} | {"num_hidden_layers": layers}
    raw |= {"model_type": "phi3_v", "rope_scaling": {"type": "su", **factors}, "img_processor": {}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    shard, files, number = {}, {}, 1
    for name, like in tree_flatten(model_of(replace(PHI, num_hidden_layers=layers), bits).parameters()):
        if mx.issubdtype(like.dtype, mx.floating):
            shard[name] = mx.random.normal(like.shape, mx.bfloat16, scale=0.02)
        else:
            shard[name] = mx.random.randint(0, 1 << 31, like.shape).astype(like.dtype)
        mx.eval(shard[name])
        files[name] = f"model-{number:05d}.safetensors"
        if sum(a.nbytes for a in shard.values()) > SHARD:
            mx.save_safetensors(str(folder / files[name]), shard)
            shard, number = {}, number + 1
    if shard:
        mx.save_safetensors(str(folder / files[name]), shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def measure_load(folder: Path) -> None:
    def resident() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    paths, kept = weight_files(folder), []
    mx.eval(mx.ones(1) + 1)
    base, began = resident(), time.perf_counter()
    model = load(folder)
    seconds = time.perf_counter() - began
    weights, top = sum(a.nbytes for _, a in tree_flatten(model.parameters())), resident() - base
    print(
        f"loaded in {seconds:.2f} s, keeps {weights / 1e9:.2f} GB of {sum(p.stat().st_size for p in paths) / 1e9:.2f};"
    )
    print(f"peak {mx.get_peak_memory() / weights:.3f} × that in MLX, {top / weights:.3f} × in the process")
    del model
    mx.clear_cache()
    began = time.perf_counter()
    kept.extend(path.read_bytes() for path in paths)
    print(f"reading the files into memory: {time.perf_counter() - began:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", type=Path, metavar="DIR")
    parser.add_argument("--load", type=Path, metavar="DIR")
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    given = parser.parse_args()
    if given.write:
        write(given.write, given.bits, given.layers)
    if given.load:
        measure_load(given.load)
    if given.check:
        check()
    if not (given.write or given.load or given.check):
        table()


if __name__ == "__main__":
    main()

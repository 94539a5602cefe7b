"""A checkpoint folder → one with fewer bits, as MLX's own conversions lay it out, and how often both say the same.

Reads, quantises and writes tensor by tensor, and compares layer by layer; knows nothing of the command line.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from .errors import SetupError
from .images import Crops, Header
from .language import KVCache, Part
from .model import PATCH_WEIGHT, load, progress, read, weight_files
from .tokenizer import Tokenizer

PICTURE = Path(__file__).parent / "demo" / "red-circle.png"
SHARD = 1 << 29  # bytes of a written file: it is in memory until it is whole
COPIED = {".json", ".jinja", ".model", ".txt", ".py", ".md", ""}  # beside the weights; LICENSE has no suffix
# What the two models are compared with: texts of everyday kinds, so short that a CPU reads them in a minute.
TEXTS = [
    ("What is shown in this image?", "A red circle."),
    ("Why is the sky blue?", "Air scatters blue light more than red light, so blue reaches our eyes from all sides."),
    ("What is 17 + 25?", "17 + 25 = 42."),
    ("Write a function that returns the larger of two numbers.", "def larger(a, b):\n    return a if a > b else b"),
    ("Translate to German: Good morning, how are you?", "Guten Morgen, wie geht es Ihnen?"),
    ("Name the four seasons.", "The four seasons are spring, summer, autumn and winter."),
    ("How do I boil an egg?", "Put the egg in boiling water for eight minutes, then cool it under cold water."),
    ("List three animals that can fly.", "1. An eagle\n2. A bat\n3. A butterfly"),
    ("What does a thermometer measure?", "A thermometer measures temperature, usually in degrees Celsius."),
]


def quantize(source: Path, out: Path, bits: int, group_size: int, vision: bool) -> tuple[int, int]:
    """Write `source` to the new folder `out`, the tower and its projection too if `vision`; bytes before and after.

    Linear and embedding weights whose width is a multiple of the group get so many bits, all else stays. `out` appears
    when it is whole. Raises SetupError, OSError.
    """
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise SetupError(f"{out} is there already: name a folder that is not, or that is empty")
    Tokenizer(source)
    load(source, lazy=True)  # says what is wrong with it
    for path in _beside(source):
        if path.resolve().parent not in (source.resolve(), source.resolve().parent.parent / "blobs"):  # the hub's cache
            raise SetupError(f"{path} leads out of its folder, and would be copied: put the file itself there")
    plan, after, before = {}, 0, 0  # of each tensor, whether it is quantised
    for path in weight_files(source):
        for name, array in read(path).items():
            if name.endswith(".scales"):
                raise SetupError(f"{source} is quantised already: name the checkpoint that it was made from")
            meant = name.endswith(".weight") and array.ndim == 2 and (vision or "vision" not in name)
            plan[name] = meant and array.shape[-1] % group_size == 0 if meant else None
            before += array.nbytes
            small = array.size * bits // 8 + 2 * array.size // group_size * array.itemsize
            after += small if plan[name] else array.nbytes
    part = out.with_name(f".{out.name}.part")
    try:
        part.mkdir()
    except FileExistsError:
        raise SetupError(f"{part} is there: another run makes {out.name}, or one was cut off; then delete it") from None
    except OSError as error:
        raise SetupError(f"cannot make {out}: {error.strerror}") from None
    try:
        if (free := shutil.disk_usage(part).free) < after:
            raise SetupError(f"{out} would have {after / 1e6:,.1f} MB, only {free / 1e6:,.1f} MB are free there")
        with progress("quantising", before) as advance:
            _write(part, _shards(_tensors(source, plan, bits, group_size, advance)), after)
        _describe(source, part, {"group_size": group_size, "bits": bits, "mode": "affine"}, plan)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return before, after


def _tensors(source: Path, plan: dict, bits: int, group_size: int, advance: Callable[[int], None]) -> Iterator[dict]:
    """What each tensor becomes, evaluated: itself, or weights, scales and biases."""
    for path in weight_files(source):
        tensors = read(path)
        for name in list(tensors):
            made = {name: (array := tensors.pop(name))}
            advance(array.nbytes)
            if plan[name]:
                names = [name.removesuffix("weight") + kind for kind in ("weight", "scales", "biases")]
                made = dict(zip(names, mx.quantize(array, group_size=group_size, bits=bits), strict=True))
            elif name == PATCH_WEIGHT and array.shape[-1] != 3:
                made = {name: mx.contiguous(array.moveaxis(1, -1))}  # MLX's layout of a convolution
            mx.eval(made)
            mx.clear_cache()
            yield made


def _shards(tensors: Iterator[dict]) -> Iterator[dict]:
    shard: dict[str, mx.array] = {}
    for made in tensors:
        if shard and sum(x.nbytes for x in (shard | made).values()) > SHARD:
            yield shard
            shard = {}
        shard |= made
    yield shard


def _write(folder: Path, shards: Iterator[dict], total: int) -> None:
    files: list[dict] = []
    for shard in shards:
        path = folder / f"{len(files)}.safetensors"
        try:
            mx.save_safetensors(str(path), shard, metadata={"format": "mlx"})
        except RuntimeError as error:
            raise SetupError(f"cannot write {path}: {error} Is the disk full?") from None
        files.append(dict.fromkeys(shard))
    weight_map = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _describe(source: Path, folder: Path, quantization: dict, plan: dict) -> None:
    """config.json, with the layers that had no fitting width, and all files beside the weights."""
    for path in _beside(source):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((source / "config.json").read_bytes())
    quantization |= {name.removesuffix(".weight"): False for name, fits in plan.items() if fits is False}
    config |= {"quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _beside(source: Path) -> list[Path]:
    """What is copied; not hidden files, in which people keep tokens."""
    return [p for p in source.glob("[!.]*") if p.is_file() and p.suffix in COPIED and not p.match("*.index.json")]


def agreement(source: Path, out: Path) -> tuple[int, int]:
    """At how many places of the answers of TEXTS both models would say the same next, greedily, and of how many.

    Both read the same text before each place: left to themselves, one early difference would make all that follows
    differ, and the figure would say more of where it came than of how many there are.
    """
    tokenizer, texts = Tokenizer(source), []
    crops = Header(PICTURE, 1).crops()
    for i, (question, answer) in enumerate(TEXTS):
        asked = [("user", [*([] if i else [-1, "\n"]), question])]
        before, whole = (
            tokenizer.encode(tokenizer.chat(chat), [crops.tokens], 1 << 20)
            for chat in (asked, [*asked, ("assistant", [answer])])
        )
        texts.append((np.array(whole), len(before)))
    first, second = (_choices(folder, texts, crops) for folder in (source, out))
    return int((first == second).sum()), len(first)


def _choices(folder: Path, texts: list[tuple], crops: Crops) -> np.ndarray:
    """The most probable token at each place of the answers; a layer is read when its turn comes, and then freed."""
    phi = load(folder, lazy=True)
    layers, features = phi.model.layers, phi.image_features([crops])
    mx.eval(features)
    del phi.model.vision_embed_tokens
    x = mx.concatenate([phi.embed(ids, np.arange(len(ids)) - (ids < 0).argmax(), features) for ids, _ in texts])
    parts = [Part(KVCache(len(layers)), len(ids), phi.config.is_long(len(ids))) for ids, _ in texts]
    size = sum(path.stat().st_size for path in weight_files(folder))
    with progress(f"comparing, through {folder.name}", size) as advance:
        for i in range(len(layers)):
            x = layers[i](x, i, parts, None)
            mx.eval(x)
            layers[i] = None
            for part in parts:
                part.cache.keys[i] = part.cache.values[i] = None
            mx.clear_cache()
            advance(size // len(layers))
    starts = np.cumsum([0] + [len(ids) for ids, _ in texts])
    rows = [np.arange(at + first - 1, at + len(ids)) for at, (ids, first) in zip(starts, texts, strict=False)]
    return np.array(mx.argmax(phi.lm_head(phi.model.norm(x)[mx.array(np.concatenate(rows))]), -1))

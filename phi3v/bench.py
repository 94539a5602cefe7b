"""How fast and how large a model is on this machine: what `phi3v bench` measures, and its table.

Asks phi3v's own LLM and engine, as requests do; knows nothing of argparse or of other engines. Prompts are random ids
and pictures coloured squares, new in each round: no cache helps but where a row says how much was kept.
"""

import io
import os
import platform
from collections.abc import Callable, Iterator
from time import perf_counter

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from . import __version__, fast_blas, images
from .engine import MLX
from .llm import LLM, find
from .request import Chat, Delta, Picture, Request, SamplingParams, question
from .sequences import Prompt
from .terminal import _progress

SECONDS, ROUNDS = 4.0, 9  # for one case, and at most: all of them end within 2 minutes, on two cores or on a laptop
PREFILL = 512, 2048  # tokens of a prompt, or what the context has room for
TOGETHER = 1, 8, 32  # sequences, or as many as may run at once
SHORT, NEW, CROPS = 64, 32, 4  # tokens of their prompts and answers; parts of a picture, seen beside the whole
TEXTS = "What is shown in this image?", "How many squares are red?", "There are three.", "Are you sure?"
ABOUT = """phi3v {phi3v} · {model} · {weights}
{device}, {cores} cores, {memory_gb} GB · {system}
Python {python} · MLX {mlx} · BLAS {blas}

| measured | | rounds |
|---|--:|--:|"""
NOTE = """
Medians; a first round counts only if it took long. Memory: MLX's arrays; on a CPU others take more.
Questions: from a PNG of 672×672 pixels to the first token. Decoding: 32 new tokens, behind 64."""


def measure(name: str, adapter: str | None = None) -> dict:
    """What ran, and `rows`: `name`, the median `value`, its `unit`, how many `rounds`, and a round's tokens if any."""
    find(name)  # a download is not what is timed
    began = perf_counter()
    with LLM(name, adapter=adapter) as llm:
        llm.wait()
        loading, model, info = 1000 * (perf_counter() - began), llm._engine._model, mx.device_info()
        rows = [("loading", [loading], "ms", {}), *_rows(llm, model, np.random.default_rng(0))]
        weights = [f"{n} bits" for n in sorted({module.bits for module in model.modules() if hasattr(module, "bits")})]
        weights.append(str(model.model.norm.weight.dtype).rpartition(".")[2])
    memory = info.get("total_memory") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    about = {"phi3v": __version__, "model": llm.checkpoint, "weights": ", ".join(weights), "mlx": mx.__version__}
    about |= {"device": f"{info['device_name']} {mx.default_device().type.name.upper()}", "cores": os.cpu_count()}
    about |= {"memory_gb": round(memory / 1e9, 1), "system": " ".join(platform.platform().split("-")[:2])}
    about |= {"python": platform.python_version(), "blas": fast_blas() or "that of MLX"}
    rows = [{"name": n, "value": float(np.median(v)), "unit": u, "rounds": len(v)} | c for n, v, u, c in rows]
    return about | {"rows": rows}


def table(found: dict) -> str:
    """The same as Markdown."""
    lines = [ABOUT.format(**found)]
    for row in found["rows"]:
        value = f"{row['value']:{',.0f' if row['value'] >= 100 else '.3g'}} {row['unit']}"
        lines.append(f"| {row['name']} | {value} | {row['rounds']} |")
    return "\n".join([*lines, NOTE])


def _rows(llm: LLM, model, rng: np.random.Generator) -> Iterator[tuple[str, list[float], str, dict[str, int]]]:
    """Name, a value for each round, unit and counts of tokens."""
    sizes = {"weights": sum(array.nbytes for _, array in tree_flatten(model.parameters()))}
    sizes |= {"memory, loaded": mx.get_active_memory(), "memory, peak while loading": mx.get_peak_memory()}
    yield from ((name, [size / 1e6], "MB", {}) for name, size in sizes.items())
    mx.reset_peak_memory()
    crops = images.Header(_picture(rng), CROPS).crops()
    with MLX:  # the engine, which has nothing to do, stays out of it
        looks = _repeat("vision tower", lambda: mx.eval(model.image_features([crops])))
    yield f"vision tower, {len(crops.pixels)} crops", [1000 * t for t, _ in looks], "ms", {"tokens": crops.tokens}
    for length in sorted({min(length, llm.limits["context"] - 1) for length in PREFILL}):
        runs = _repeat(name := f"prefill, {length:,} tokens", lambda n=length: _run(llm, rng, (1, n), 1))
        yield name, [length / seconds for seconds, _ in runs], "tok/s", {"tokens": length}
    rounds = [turns for _, turns in _repeat("questions about a picture", lambda: _converse(llm, _picture(rng)))]
    for which, answers in zip(("first", "second", "next turn's"), zip(*rounds, strict=True), strict=True):
        [delta] = answers[-1][1]
        tokens, kept = delta.prompt_tokens, delta.cached_tokens
        name, counts = f"{which} question, {kept} of {tokens} tokens kept", {"tokens": tokens, "cached_tokens": kept}
        yield name, [1000 * seconds for seconds, _ in answers], "ms", counts
    for count in sorted({min(count, llm.limits["batch"]) for count in TOGETHER}):
        runs = _repeat(name := f"decode, {count} at once", lambda n=count: _run(llm, rng, (n, SHORT), NEW))
        pauses = [np.concatenate([np.diff(t[t >= times[:, 0].max()]) for t in times]) for _, times in runs]
        yield name, [count / each.mean() for each in pauses], "tok/s", {"tokens": runs[-1][1].size}
        yield f"{name}: from token to token", [1000 * np.median(each) for each in pauses], "ms", {}
    yield "memory, peak of all this", [mx.get_peak_memory() / 1e6], "MB", {}
    _progress("")


def _repeat(name: str, once: Callable) -> list[tuple]:
    """Seconds and results of several calls, after one that warms up; or of a single one, if that took long."""
    _progress(f"{name} …")
    first = _timed(once)
    rounds = min(ROUNDS, max(3, int(SECONDS / first[0]))) if first[0] < SECONDS else 0
    return [_timed(once) for _ in range(rounds)] or [first]


def _timed(call: Callable) -> tuple:
    began, result = perf_counter(), call()
    return perf_counter() - began, result


def _run(llm: LLM, rng: np.random.Generator, shape: tuple[int, int], new: int) -> np.ndarray:
    """When each of so many prompts of so many tokens had its `new` ones: without end ids none ends before."""
    ids = rng.integers(3, llm.config.vocab_size, shape).tolist()
    items = llm._engine.submit([Prompt(each, [], new) for each in ids])
    seen = [(index, perf_counter()) for index, _, _ in items]
    return np.array([[moment for index, moment in seen if index == k] for k in range(len(ids))])


def _converse(llm: LLM, png: bytes) -> list[tuple[float, list[Delta]]]:
    """The first tokens of a question about a picture, of another, and of one more after an answer to that."""
    chats, params = [question(text, [Picture(png)]) for text in TEXTS[:2]], SamplingParams(1, CROPS)
    chats.append(Chat([*chats[1].messages, ("assistant", [TEXTS[2]]), ("user", [TEXTS[3]])], chats[1].pictures))
    return [_timed(lambda chat=chat: [*llm.answer(Request([chat], params))]) for chat in chats]


def _picture(rng: np.random.Generator) -> bytes:
    """A PNG of 14 × 14 coloured squares, as large as 2 × 2 crops."""
    squares = rng.integers(0, 256, (14, 14, 3), np.uint8).repeat(48, 0).repeat(48, 1)
    Image.fromarray(squares).save(png := io.BytesIO(), "PNG")
    return png.getvalue()

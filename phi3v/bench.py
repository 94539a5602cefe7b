"""How fast and how large a model is on this machine: what `phi3v bench` measures, and its table.

Asks phi3v's own LLM and engine, as requests do; knows nothing of argparse or of other engines. Prompts are random ids
and pictures coloured squares, new in each round: no cache helps but where a row says how much was kept.
"""

import io
import os
import platform
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

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
SHORT, NEW = 64, 32  # tokens of their prompts and answers
CROPS = 4  # of a picture, and the whole of it
TEXTS = "What is shown in this image?", "How many squares are red?", "There are three.", "Are you sure?"
ABOUT = """phi3v {phi3v} · {model} · {weights}
{device}, {cores} cores, {memory_gb} GB · {system}
Python {python} · MLX {mlx} · BLAS {blas}

| measured | | rounds |
|---|--:|--:|"""
NOTE = """
Medians of the rounds after a first one, or that one if it took long. Memory is that of MLX's arrays:
all that a GPU holds; on a CPU Python, Pillow and the BLAS take more. A question is timed from a PNG
of 672×672 pixels to its first token, prefill to the first token, decoding while all run."""


def measure(name: str, adapter: str | None = None) -> dict:
    """What ran, and `rows`: each with `name`, the median `value`, its `unit` and how many `rounds`.

    A row may have `tokens`, those of a round, and how many of them were `cached_tokens`. Raises SetupError.
    """
    find(name)  # a download is not what is timed
    began = perf_counter()
    with LLM(name, adapter=adapter) as llm:
        llm.wait()
        loading, model, info = [perf_counter() - began], llm._engine._model, mx.device_info()
        rows = [("loading", loading, "s", {}), *_rows(llm, model, np.random.default_rng(0))]
        weights = [f"{n} bits" for n in sorted({module.bits for module in model.modules() if hasattr(module, "bits")})]
        weights.append(str(model.model.norm.weight.dtype).rpartition(".")[2])
    memory = info.get("total_memory") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    mac, other = platform.mac_ver()[0], f"{platform.system()} {platform.release().partition('-')[0]}"
    about = {"phi3v": __version__, "model": llm.checkpoint, "weights": ", ".join(weights)}
    about |= {"device": f"{info['device_name']} {mx.default_device().type.name.upper()}", "cores": os.cpu_count()}
    about |= {"memory_gb": round(memory / 1e9, 1), "system": f"macOS {mac}" if mac else other, "mlx": mx.__version__}
    about |= {"python": platform.python_version(), "blas": fast_blas() or ("Accelerate" if mac else "MLX's own")}
    median = lambda values: {"value": float(np.median(values)), "rounds": len(values)}  # noqa: E731
    return about | {"rows": [{"name": n, "unit": unit} | median(values) | counts for n, values, unit, counts in rows]}


def table(found: dict) -> str:
    """The same as Markdown."""
    lines = [ABOUT.format(**found)]
    for row in found["rows"]:
        value, unit = row["value"], row["unit"]
        if value < 1 and unit in ("s", "GB"):
            value, unit = 1000 * value, {"s": "ms", "GB": "MB"}[unit]
        lines.append(f"| {row['name']} | {value:{',.0f' if value >= 100 else '.3g'}} {unit} | {row['rounds']} |")
    return "\n".join([*lines, NOTE])


def _rows(llm: LLM, model, rng: np.random.Generator) -> Iterator[tuple[str, list[float], str, dict[str, int]]]:
    """Name, a value for each round, unit and counts of tokens."""
    sizes = {"weights": sum(array.nbytes for _, array in tree_flatten(model.parameters()))}
    sizes |= {"memory, loaded": mx.get_active_memory(), "memory, peak while loading": mx.get_peak_memory()}
    yield from ((name, [size / 1e9], "GB", {}) for name, size in sizes.items())
    mx.reset_peak_memory()
    crops = images.Header(_picture(rng), CROPS).crops()
    name = f"vision tower, {len(crops.pixels)} crops"
    with MLX:  # the engine, which has nothing to do, stays out of it
        looks = _repeat(name, lambda: mx.eval(model.image_features([crops])))
    yield name, [seconds for seconds, _ in looks], "s", {"tokens": crops.tokens}
    for length in sorted({min(length, llm.limits["context"] - 1) for length in PREFILL}):
        runs = _repeat(name := f"prefill, {length:,} tokens", lambda n=length: _run(llm, rng, (1, n), 1))
        yield name, [length / seconds for seconds, _ in runs], "tok/s", {"tokens": length}
    rounds = [turns for _, turns in _repeat("questions about a picture", lambda: _converse(llm, _picture(rng)))]
    for which, answers in zip(("first", "second", "next turn's"), zip(*rounds, strict=True), strict=True):
        [delta] = answers[-1][1]
        counts = {"tokens": delta.prompt_tokens, "cached_tokens": delta.cached_tokens}
        name = f"{which} question, {delta.cached_tokens} of {delta.prompt_tokens} tokens kept"
        yield name, [seconds for seconds, _ in answers], "s", counts
    for count in sorted({min(count, llm.limits["batch"]) for count in TOGETHER}):
        runs = _repeat(name := f"decode, {count} at once", lambda n=count: _run(llm, rng, (n, SHORT), NEW))
        pauses = [np.concatenate([np.diff(t[t >= times[:, 0].max()]) for t in times]) for _, times in runs]
        yield name, [count / each.mean() for each in pauses], "tok/s", {"tokens": runs[-1][1].size}
        yield f"{name}: from token to token", [np.median(each) for each in pauses], "s", {}
    yield "memory, peak of all this", [mx.get_peak_memory() / 1e9], "GB", {}
    _progress("")


def _repeat(name: str, once: Callable) -> list[tuple[float, Any]]:
    """Seconds and results of several calls, after one that warms up; or of a single one, if that took long."""
    _progress(f"{name} …")
    first = _timed(once)
    rounds = min(ROUNDS, max(3, int(SECONDS / first[0])))
    return [first] if first[0] >= SECONDS else [_timed(once) for _ in range(rounds)]


def _timed(call: Callable) -> tuple[float, Any]:
    began, result = perf_counter(), call()
    return perf_counter() - began, result


def _run(llm: LLM, rng: np.random.Generator, shape: tuple[int, int], new: int) -> np.ndarray:
    """When each of so many prompts of so many tokens had its `new` ones: without end ids none ends before."""
    ids = rng.integers(3, llm.config.vocab_size, shape).tolist()
    times: list[list[float]] = [[] for _ in ids]
    for index, _, _ in llm._engine.submit([Prompt(each, [], new) for each in ids]):
        times[index].append(perf_counter())
    return np.array(times)


def _converse(llm: LLM, png: bytes) -> list[tuple[float, list[Delta]]]:
    """The first tokens of a question about a picture, of another, and of one more after an answer to that."""
    chats, params = (
        [question(text, [Picture(png)]) for text in TEXTS[:2]],
        SamplingParams(max_tokens=1, num_crops=CROPS),
    )
    chats.append(Chat([*chats[1].messages, ("assistant", [TEXTS[2]]), ("user", [TEXTS[3]])], chats[1].pictures))
    return [_timed(lambda chat=chat: [*llm.answer(Request([chat], params))]) for chat in chats]


def _picture(rng: np.random.Generator) -> bytes:
    """A PNG of 14 × 14 coloured squares, as large as 2 × 2 crops."""
    squares = rng.integers(0, 256, (14, 14, 3), np.uint8).repeat(48, 0).repeat(48, 1)
    Image.fromarray(squares).save(png := io.BytesIO(), "PNG")
    return png.getvalue()

"""What a person meets at a terminal: answers, measurements, a server's greeting, and the page opened in a browser.

Knows nothing of argparse or signals. What needs the model is imported inside: `list` and its like start without it.
"""

import argparse
import base64
import io
import json
import os
import platform
import random
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing, nullcontext
from itertools import islice, pairwise
from pathlib import Path
from statistics import mean, median
from time import perf_counter

from . import __version__, fast_blas, need_mlx, open_llm, tls
from .errors import RequestError, SetupError, check_text
from .request import Chat, Delta, Picture, Request, SamplingParams, question

AT_ONCE = 32  # pictures of --each on their way: 0.7 GB if all were cut into the most crops and none was looked at yet
QUESTION = "What is shown in this image?"
EXAMPLE = Path(__file__).parent / "demo" / "red-circle.png"
STATUS = """exit status: 0 answered; 1 failed, which with --each is any picture that was not answered, or whoever read
the output has left, as in `| head`; 2 wrong arguments; 130 interrupted by Ctrl-C"""
SECONDS, ROUNDS = 4.0, 9  # for one case of bench, and at most: all end within 2 minutes, on two cores or on a laptop
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


def generate(arguments: argparse.Namespace) -> None:
    """Answer on stdout: one text as it is made, one JSON object, or with --each a JSON line for each picture."""
    if arguments.out and not arguments.each:
        arguments.refuse("--out is for --each")
    if (arguments.prompt, *arguments.image).count("-") > 1:
        arguments.refuse("standard input is one thing only: the prompt, or one --image")
    prompt = arguments.prompt if arguments.prompt != "-" else sys.stdin.buffer.read().decode(errors="replace").strip()
    prompt = os.fsencode(prompt).decode(errors="replace")  # an argument that is no UTF-8 must not be a traceback
    check_text("the prompt", prompt)
    pictures = [_picture(name) for name in arguments.image]
    params = SamplingParams(max_tokens=arguments.max_tokens, num_crops=arguments.num_crops)
    if sys.stdout and (arguments.json or arguments.each):  # JSON is UTF-8; a file's name that is none stays readable
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    with open_llm(arguments.model, adapter=arguments.adapter, cache_bytes=0) as llm:  # nothing is asked twice
        if arguments.each:
            _each(llm, prompt, params, arguments.each, arguments.out)
            return
        llm.wait()
        shown = visible if sys.stdout and sys.stdout.isatty() else str  # a program gets what was said
        show = (lambda _: None) if arguments.json else (lambda piece: print(shown(piece), end="", flush=True))
        answer = _ask(llm, prompt, pictures, params, show)
        print(visible(json.dumps(answer, ensure_ascii=False)) if arguments.json else "")


def visible(text: str) -> str:
    """Control characters as JSON writes them: a stranger's text must not steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _progress(text: str) -> None:
    if sys.stderr and sys.stderr.isatty():
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)


def _picture(name: str) -> Picture:
    if name == "-":
        return Picture(sys.stdin.buffer.read(), "standard input")
    if not os.path.exists(name):
        raise SetupError(f"there is no picture {name}")
    return Picture(Path(name), name)


def _ask(llm, prompt: str, pictures: list[Picture], params: SamplingParams, show: Callable[[str], object]) -> dict:
    """The answer, why it ended and what it took; `show` is given each piece as it comes."""
    began, text = perf_counter(), ""
    with llm.answer(Request([question(prompt, pictures)], params)) as deltas:
        for delta in deltas:
            text += delta.text
            show(delta.text)
    usage = {"prompt_tokens": delta.prompt_tokens, "completion_tokens": delta.completion_tokens}
    usage |= {"total_tokens": sum(usage.values())}
    facts = {"usage": usage, "model": llm.checkpoint, "seconds": round(perf_counter() - began, 3)}
    return {"text": text, "finish_reason": delta.finish_reason} | facts


def _each(llm, prompt: str, params: SamplingParams, files: list[str], out: str | None) -> None:
    """A JSON line for each file that `out` does not answer yet, in order of completion; SetupError if any failed."""
    same = {"prompt": prompt, "model": llm.checkpoint}
    answered, told = _answered(out, same) if out else (set(), set())
    files = [file for file in dict.fromkeys(files) if file not in answered]
    llm.wait()
    began, failed = perf_counter(), 0
    to = open(out, "a", encoding="utf-8", errors="backslashreplace") if out else nullcontext(sys.stdout)
    with to as lines, closing(_answers(llm, prompt, params, files)) as answers:
        for done, answer in enumerate(answers, 1):
            failed += "error" in answer
            _progress("")
            if (answer["file"], answer.get("error")) not in told:
                print(visible(json.dumps(answer | same, ensure_ascii=False)), file=lines, flush=True)
            rate = done / (perf_counter() - began)
            minutes, seconds = divmod(round((len(files) - done) / rate), 60)
            _progress(f"{done} of {len(files)} · {rate:.1f} pictures/s · {minutes}:{seconds:02} left · {failed} failed")
        _progress("")
    if failed:
        raise SetupError(f"{failed} of {len(files)} pictures were not answered; their lines say why")


def _answers(llm, prompt: str, params: SamplingParams, files: Iterable[str]) -> Iterator[dict]:
    """As many at once as the engine runs together; the others are not read yet."""

    def answer(file: str) -> dict:
        try:
            if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
                raise RequestError("it is no file")  # a pipe that nobody writes would never end
            reply = _ask(llm, prompt, [Picture(Path(file), file)], params, bool)
            return {"file": file, "text": reply["text"], "finish_reason": reply["finish_reason"]}
        except RequestError as error:
            reason = error.message.removeprefix(f"{file}: ")
        except OSError as error:
            reason = error.strerror or str(error)
        except RuntimeError:
            reason = "the model has failed with it"
        if llm.status == "failed":
            raise SetupError("the engine has failed")  # and would with all the others
        return {"file": file, "error": reason}

    width, left, running = min(llm.limits["batch"], AT_ONCE), iter(files), set()
    pool = ThreadPoolExecutor(width)
    try:
        while running := running | {pool.submit(answer, file) for file in islice(left, width - len(running))}:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # what still runs ends when the model is closed


def _answered(out: str, same: dict[str, str]) -> tuple[set[str], set[tuple[str, str]]]:
    """The files that `out` has answers to, and its others with their errors.

    A last line that a kill cut off is taken away; a file of something else is refused.
    """
    answered, told, end = set(), set(), 0
    if not os.path.exists(out):
        return answered, told
    with open(out, "r+b") as lines:
        for raw in lines:
            if not raw.endswith(b"\n") and raw.startswith(b'{"file": '[: len(raw)]):
                lines.truncate(end)
                break
            end += len(raw)
            try:
                line = json.loads(raw)
                if {"file", "text", *same} <= line.keys():
                    answered.add(line["file"])
                else:
                    told.add((line["file"], line["error"]))  # is tried again
            except (ValueError, KeyError, TypeError, AttributeError):
                raise SetupError(f"{out} has lines that --each did not write: name another file with --out") from None
            if other := [f"the {name} {line[name]!r:.99}" for name in same if line.get(name) != same[name]]:
                raise SetupError(f"{out} was made with {' and '.join(other)}: ask the same, or name another --out")
    return answered, told


def bench(arguments: argparse.Namespace) -> None:
    """Print what a model does on this machine, as a table to paste into an issue or as JSON.

    Prompts are random ids and pictures coloured squares, new in each round: no cache helps but where a row says so.
    """
    found = measure(arguments.model, arguments.adapter)
    if arguments.json:
        return print(json.dumps(found))
    print(ABOUT.format(**found))
    for row in found["rows"]:
        value = f"{row['value']:{',.0f' if row['value'] >= 100 else '.3g'}} {row['unit']}"
        print(f"| {row['name']} | {value} | {row['rounds']} |")
    print(NOTE)


def measure(name: str, adapter: str | None = None) -> dict:
    """What ran, and `rows`: `name`, the median `value`, its `unit`, how many `rounds`, and a round's tokens if any."""
    need_mlx()
    import mlx.core as mx

    from .llm import find

    find(name)  # a download is not what is timed
    began = perf_counter()
    with open_llm(name, adapter=adapter) as llm:
        llm.wait()
        loading, model, info = 1000 * (perf_counter() - began), llm._engine._model, mx.device_info()
        rows = [("loading", [loading], "ms", {}), *_rows(llm, model, random.Random(0))]
        weights = [f"{n} bits" for n in sorted({module.bits for module in model.modules() if hasattr(module, "bits")})]
        weights.append(str(model.model.norm.weight.dtype).rpartition(".")[2])
    memory = info.get("total_memory") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    about = {"phi3v": __version__, "model": llm.checkpoint, "weights": ", ".join(weights), "mlx": mx.__version__}
    about |= {"device": f"{info['device_name']} {mx.default_device().type.name.upper()}", "cores": os.cpu_count()}
    about |= {"memory_gb": round(memory / 1e9, 1), "system": " ".join(platform.platform().split("-")[:2])}
    about |= {"python": platform.python_version(), "blas": fast_blas() or "that of MLX"}
    return about | {"rows": [{"name": n, "value": median(v), "unit": u, "rounds": len(v)} | c for n, v, u, c in rows]}


def _rows(llm, model, rng: random.Random) -> Iterator[tuple[str, list[float], str, dict[str, int]]]:
    """Name, a value for each round, unit and counts of tokens."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from .engine import MLX
    from .images import Header

    sizes = {"weights": sum(array.nbytes for _, array in tree_flatten(model.parameters()))}
    sizes |= {"memory, loaded": mx.get_active_memory(), "memory, peak while loading": mx.get_peak_memory()}
    yield from ((name, [size / 1e6], "MB", {}) for name, size in sizes.items())
    mx.reset_peak_memory()
    crops = Header(_squares(rng), CROPS).crops()
    with MLX:  # the engine, which has nothing to do, stays out of it
        looks = _repeat("vision tower", lambda: mx.eval(model.image_features([crops])))
    yield f"vision tower, {len(crops.pixels)} crops", [1000 * t for t, _ in looks], "ms", {"tokens": crops.tokens}
    for length in sorted({min(length, llm.limits["context"] - 1) for length in PREFILL}):
        runs = _repeat(name := f"prefill, {length:,} tokens", lambda n=length: _run(llm, rng, 1, n, 1))
        yield name, [length / seconds for seconds, _ in runs], "tok/s", {"tokens": length}
    rounds = [turns for _, turns in _repeat("questions about a picture", lambda: _converse(llm, _squares(rng)))]
    for which, answers in zip(("first", "second", "next turn's"), zip(*rounds, strict=True), strict=True):
        [delta] = answers[-1][1]
        tokens, kept = delta.prompt_tokens, delta.cached_tokens
        name, counts = f"{which} question, {kept} of {tokens} tokens kept", {"tokens": tokens, "cached_tokens": kept}
        yield name, [1000 * seconds for seconds, _ in answers], "ms", counts
    for count in sorted({min(count, llm.limits["batch"]) for count in TOGETHER}):
        runs = _repeat(name := f"decode, {count} at once", lambda n=count: _run(llm, rng, n, SHORT, NEW))
        pauses = []
        for _, times in runs:  # from when all have their first token
            first = max(moments[0] for moments in times)
            pauses.append([b - a for each in times for a, b in pairwise(moment for moment in each if moment >= first)])
        yield name, [count / mean(each) for each in pauses], "tok/s", {"tokens": count * NEW}
        yield f"{name}: from token to token", [1000 * median(each) for each in pauses], "ms", {}
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


def _run(llm, rng: random.Random, count: int, length: int, new: int) -> list[list[float]]:
    """When each of `count` prompts of so many tokens had its `new` ones: without end ids none ends before."""
    from .sequences import Prompt

    words = range(3, llm.config.vocab_size)
    prompts = [Prompt(rng.choices(words, k=length), [], new) for _ in range(count)]
    times: list[list[float]] = [[] for _ in prompts]
    for index, _, _ in llm._engine.submit(prompts):
        times[index].append(perf_counter())
    return times


def _converse(llm, png: bytes) -> list[tuple[float, list[Delta]]]:
    """The first tokens of a question about a picture, of another, and of one more after an answer to that."""
    chats, params = [question(text, [Picture(png)]) for text in TEXTS[:2]], SamplingParams(1, CROPS)
    chats.append(Chat([*chats[1].messages, ("assistant", [TEXTS[2]]), ("user", [TEXTS[3]])], chats[1].pictures))
    return [_timed(lambda chat=chat: [*llm.answer(Request([chat], params))]) for chat in chats]


def _squares(rng: random.Random) -> bytes:
    """A PNG of 14 × 14 coloured squares, as large as 2 × 2 crops."""
    from PIL import Image

    squares = Image.frombytes("RGB", (14, 14), rng.randbytes(14 * 14 * 3))
    squares.resize((672, 672), Image.Resampling.NEAREST).save(png := io.BytesIO(), "PNG")
    return png.getvalue()


def say_hello(arguments: argparse.Namespace, llm, keys, log_file: Path | None, port: int) -> None:
    """What a person needs to know: where it is, which model answers, where things lie, and a line to try it."""
    name, certificate = tls.public_name(arguments.host), Path(arguments.certfile).absolute()
    everyone = arguments.host in ("0.0.0.0", "::")
    here = "localhost" if everyone else f"[{name}]" if ":" in name else name
    batch, queue, context, kept = llm.limits.values()
    lines = [
        f"phi3v {__version__} answers at https://{here}:{port}",
        _model(arguments, llm),
        f"{batch} sequences at once of {queue} taken, {context:,} tokens each, {kept / 1e9:.1f} GB for what was read",
        f"keys in {keys.path}, log in {log_file or 'no file'}",
    ]
    if sys.platform == "linux":
        slow = "the slow BLAS of the MLX wheel: README says how to get OpenBLAS"
        lines += [f"matrix products by {fast_blas() or slow}"]
    lines += tls.trust_lines(certificate)
    if everyone:
        lines += [f"\nothers on this network: https://{name}:{port}, with a copy of {certificate}"]
        lines += [f"whose SHA-256 fingerprint is {tls.fingerprint(certificate)}"]
        lines += tls.trust_lines(certificate, everyone=True)
    secret, some = "YOUR_API_KEY", keys.list()
    if arguments.first_key and not some:
        _, secret = keys.create("first")
        lines += [f"\nyour API key, shown only this once:\n{secret}"]
    else:
        lines += [f"\nto make {'another' if some else 'a first'} API key: phi3v create --name NAME --db {keys.path}"]
    body = json.dumps({"prompt": QUESTION, "images": [base64.b64encode(EXAMPLE.read_bytes()).decode()]})
    curl = f"curl --cacert {shlex.quote(str(certificate))} https://{here}:{port}/v1/completions"
    headers = f"-H 'Content-Type: application/json' -H 'X-API-Key: {secret}'"
    lines += ["\ntry it, with a browser at that address or here:", f"{curl} {headers} -d '{body}'\n"]
    print(*lines, sep="\n", flush=True)


def _model(arguments: argparse.Namespace, llm) -> str:
    demo = " (the small embedded demo, not Phi-3.5-vision)" if arguments.model == "demo" else ""
    return f"model {llm.checkpoint}{demo}"


def open_page(arguments: argparse.Namespace, llm, keys, log_file: Path | None, port: int) -> None:
    """Say where the page is, with a key of its own, and open it where there is a browser for it.

    The key stands in the fragment, which no browser sends. All users see a process's arguments: the browser is given
    a file instead, beside the keys in a folder of this user alone, that leads on to the page.
    """
    import webbrowser

    _, secret = keys.create("chat")
    url = f"https://localhost:{port}/#key={secret}"
    trust = tls.trust_lines(Path(arguments.certfile).absolute())
    print(f"phi3v {__version__}, {_model(arguments, llm)}", *trust, sep="\n")
    print(f"\n{url}\nthe page, and its key, end with Ctrl-C here", flush=True)
    screen = sys.platform == "darwin" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")))
    if arguments.no_browser or not screen:  # without a screen it would be a browser in this terminal
        return
    page = keys.path.with_name("open.html")
    page.touch(0o600)
    page.write_text(f'<!doctype html><meta http-equiv="refresh" content="0; url={url}"><a href="{url}">phi3v</a>')
    if not webbrowser.open(page.as_uri()):
        print("no browser was found: open that address yourself", file=sys.stderr)

"""What a person meets at a terminal: answers, progress, a server's greeting, and the page opened in a browser.

Knows nothing of argparse or signals. What needs the model is imported inside: `list` and its like start without it.
"""

import argparse
import base64
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path

from . import __version__, fast_blas, open_llm, tls
from .errors import RequestError, SetupError, check_text
from .request import Picture, Request, SamplingParams, question

AT_ONCE = 32  # pictures of --each on their way: 0.7 GB if all were cut into the most crops and none was looked at yet
QUESTION = "What is shown in this image?"
EXAMPLE = Path(__file__).parent / "demo" / "red-circle.png"
STATUS = """exit status: 0 answered; 1 failed, which with --each is any picture that was not answered, or whoever read
the output has left, as in `| head`; 2 wrong arguments; 130 interrupted by Ctrl-C"""


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
    began, text = time.monotonic(), ""
    with llm.answer(Request([question(prompt, pictures)], params)) as deltas:
        for delta in deltas:
            text += delta.text
            show(delta.text)
    usage = {"prompt_tokens": delta.prompt_tokens, "completion_tokens": delta.completion_tokens}
    usage |= {"total_tokens": sum(usage.values())}
    facts = {"usage": usage, "model": llm.checkpoint, "seconds": round(time.monotonic() - began, 3)}
    return {"text": text, "finish_reason": delta.finish_reason} | facts


def _each(llm, prompt: str, params: SamplingParams, files: list[str], out: str | None) -> None:
    """A JSON line for each file that `out` does not answer yet, in order of completion; SetupError if any failed."""
    same = {"prompt": prompt, "model": llm.checkpoint}
    answered = _answered(out, same) if out else set()
    files = [file for file in dict.fromkeys(files) if file not in answered]
    llm.wait()
    began, failed = time.monotonic(), 0
    to = open(out, "a", encoding="utf-8", errors="backslashreplace") if out else nullcontext(sys.stdout)
    with to as lines, closing(_answers(llm, prompt, params, files)) as answers:
        for done, answer in enumerate(answers, 1):
            failed += "error" in answer
            _progress("")
            print(visible(json.dumps(answer | same, ensure_ascii=False)), file=lines, flush=True)
            rate = done / (time.monotonic() - began)
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


def _answered(out: str, same: dict[str, str]) -> set[str]:
    """The files answered in `out` already; a last line that a kill cut off is taken away, another's file is refused."""
    answered, end = set(), 0
    if not os.path.exists(out):
        return answered
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
                    line["error"]  # is tried again
            except (ValueError, KeyError, TypeError, AttributeError):
                raise SetupError(f"{out} has lines that --each did not write: name another file with --out") from None
            if other := [f"the {name} {line[name]!r:.99}" for name in same if line.get(name) != same[name]]:
                raise SetupError(f"{out} was made with {' and '.join(other)}: ask the same, or name another --out")
    return answered


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

"""The command line: `phi3v` and `python -m phi3v`, one function per subcommand.

Imports MLX only in the subcommands that run a model: the others answer in under 0.3 s.
"""

import argparse
import json
import logging
import logging.handlers
import os
import queue
import re
import resource
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from contextlib import closing, suppress
from pathlib import Path

from . import __version__, open_llm, terminal, tls
from .errors import RequestError, SetupError
from .keys import Key, KeyStore

ROTATED = {"maxBytes": 10_000_000, "backupCount": 5}  # server.log: 60 MB at most
UNITS = {"": 1, "KB": 1024, "MB": 1024**2, "GB": 1024**3, "M": 60, "H": 3600, "D": 86400}
COUNT = r"([1-9][0-9]{0,8})()", "a whole number of at least 1"
SIZE = r"([0-9]{1,12})(?i:([KMG]B|))", "a size such as 500KB, 1MB, 4GB or 1048576"
TIME = r"([1-9][0-9]{0,5})([mhd])", "a time such as 30m, 12h or 90d, nor 'never'"
HOST = r"[a-z0-9._-]+|[0-9a-f:.]+", "a host's name or address, without a port"
ORIGIN = r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]+)?", "an origin such as https://a.example, without a path"
GRACE = TIME[0], "a time such as 30m or 24h"
MODEL = "mlx-community/Phi-3.5-vision-instruct-4bit"  # 2.3 GB on the hub
ENDS = signal.SIGINT, signal.SIGTERM
WATCH = 0.5  # seconds between two looks at the certificate's files and at the engine
SPARE_FILES = 256  # open files beside the connections': databases, the model, libraries

log = logging.getLogger("phi3v")
log.addHandler(logging.NullHandler())  # only a server has a log; elsewhere what failed is one line


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit status: 0, 1 for an error, 2 for wrong usage."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # a terminal that cannot show "…" shows "?"
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "run"):
        if not (sys.stdin and sys.stdin.isatty() and sys.stdout and sys.stdout.isatty()):
            parser.print_help(sys.stderr)
            return 2
        arguments = parser.parse_args(["chat"])
    try:
        arguments.run(arguments)
        if sys.stdout:
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `phi3v generate … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SetupError, RequestError) as error:
        reason = str(error)
    except RuntimeError as error:  # MLX's, or the engine's with what it was that failed
        reason = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
    except OSError as error:  # a full disk, a picture that is a folder
        reason = (f"{error.filename}: " if error.filename else "") + (error.strerror or str(error))
    print(f"phi3v: {terminal.visible(reason)}", file=sys.stderr)
    return 1


def serve(arguments: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM; running requests are answered first."""
    from .server import Server

    if not arguments.host:
        raise SetupError("--host is empty: 127.0.0.1 is this machine only, 0.0.0.0 the whole network")
    names = "max_batch", "max_queue", "max_context", "cache_bytes", "idle_unload"
    limits = {name: getattr(arguments, name) for name in names}
    group = _join(arguments) if arguments.tensor_parallel else None
    signals: queue.SimpleQueue = queue.SimpleQueue()  # the only one whose put may interrupt its own get
    _catch(signals, signal.SIGHUP)  # also while a model loads, or it would end us
    # First the model: what is none must leave no files behind.
    with open_llm(arguments.model, adapter=arguments.adapter, group=group, **limits) as llm:
        if group and group.rank:
            return _follow(llm)
        log_file = _start_log(arguments)
        notices = tls.ensure_certificate(arguments.certfile, arguments.keyfile, arguments.host, *arguments.allowed_host)
        context = tls.server_context(arguments.certfile, arguments.keyfile)
        notices += _allow_descriptors(arguments.max_connections)
        both = arguments.host in ("127.0.0.1", "localhost")  # a client may try either for localhost
        addresses = [(host, arguments.port) for host in (("127.0.0.1", "::1") if both else (arguments.host,))]
        with closing(KeyStore(arguments.db)) as keys:
            server = Server(addresses, context, llm, keys)
            server.hosts = {*tls.host_names(arguments.host), *arguments.allowed_host}
            server.awaited = group.awaited if group else ()
            for name in ("origins", "max_content_length", "max_chat_content_length", "max_tokens", "max_connections"):
                setattr(server, name, getattr(arguments, name))
            for notice in notices:
                log.warning(notice)
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
            llm.wait()
            _catch(signals, *ENDS)
            arguments.hello(arguments, llm, keys, log_file, server.server_address[1])
            _watch(arguments, server, llm, signals)
            if llm.status != "failed":
                log.warning("finishing the running requests; a second Ctrl-C ends at once")
            server.stop()
            if llm.status == "failed":  # a supervisor starts it again
                reason = f"the engine has failed, the reason is in {log_file or 'what is above'}"
                raise SetupError(group.lost if group and group.lost else reason)


def _join(arguments: argparse.Namespace):
    """The ranks that run the model together, of which this process is one."""
    from . import need_mlx

    need_mlx()
    from .parallel import Group

    for option in ("adapter", "idle_unload"):
        if getattr(arguments, option):
            raise SetupError(f"--tensor-parallel does not go with --{option.replace('_', '-')}")
    group = Group(arguments.tensor_parallel)
    if group.rank:
        _warn_on_stderr()  # these have no log file
    return group


def _follow(llm) -> None:
    """Compute what rank 0 says until it ends."""
    llm.wait()
    for number in ENDS:  # Ctrl-C reaches all ranks, and rank 0 answers its requests first
        signal.signal(number, signal.SIG_IGN)
    while llm.status == "ok":
        time.sleep(WATCH)
    if llm.status == "failed":
        llm.wait()


def chat(arguments: argparse.Namespace) -> None:
    """Serve the chat page on loopback, with a key that ends with this process, and open it."""
    with tempfile.TemporaryDirectory(prefix="phi3v-chat-", dir=".") as folder:  # here: some browsers see no /tmp
        private = ["serve", "--host", "127.0.0.1", "--port", "0", "--db", f"{folder}/keys.db"]
        serve(argparse.Namespace(**vars(_parser().parse_args(private)) | vars(arguments)))


def _catch(received: queue.SimpleQueue, *numbers: int) -> None:
    """Put there whether a signal is to end us; after a first SIGINT or SIGTERM the second has its ordinary effect."""
    at_terminal = _has_terminal()

    def receive(number: int, _) -> None:
        ends = number != signal.SIGHUP or (at_terminal and not _has_terminal())  # its window was closed
        for each in ENDS if ends else ():
            signal.signal(each, signal.SIG_DFL)
        received.put(ends)

    for number in numbers:
        if number in ENDS or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, receive)


def _has_terminal() -> bool:
    with suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR))
        return True
    return False


def _watch(arguments: argparse.Namespace, server, llm, signals: queue.SimpleQueue) -> None:
    """Return when the server is to end; until then, take a certificate that was changed for new connections."""
    pair = Path(arguments.certfile), Path(arguments.keyfile)
    known = [_stamp(path) for path in pair]
    while llm.status != "failed":
        with suppress(queue.Empty):
            if signals.get(timeout=WATCH):
                return
            known = None  # SIGHUP: changed or not, it is read anew
        if known == (known := [_stamp(path) for path in pair]):
            continue
        try:
            server.context = tls.server_context(*pair)
            log.warning("read the certificate %s anew, for new connections", pair[0])
        except SetupError as error:
            log.error("%s; the certificate in use stays", error)


def _stamp(path: Path) -> tuple | None:
    with suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None


def _allow_descriptors(connections: int) -> list[str]:
    """Raise the limit of open files to what these need; says so if the system does not let us."""
    (soft, hard), wanted = resource.getrlimit(resource.RLIMIT_NOFILE), connections + SPARE_FILES
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if most > soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    advice = f"lower --max-connections, or raise the system's {most} open files (ulimit -n)"
    return [f"{connections} connections need {wanted} open files: {advice}"] * (most < wanted)


def create(arguments: argparse.Namespace) -> None:
    with closing(KeyStore(arguments.db)) as keys:
        if keys.created:
            print(f"phi3v: made a new database, {keys.path}", file=sys.stderr)
        key, secret = keys.create(arguments.name, arguments.rate_limit, _end(arguments.expires))
    print(secret)
    print(f"phi3v: that is key {key.id} of {keys.path}, shown only this once", file=sys.stderr)


def list_keys(arguments: argparse.Namespace) -> None:
    with closing(KeyStore(arguments.db, create=False)) as keys:
        found = keys.list()
    shown = json.dumps({"db": str(keys.path), "keys": [vars(key) for key in found]}, indent=2)
    print(shown if arguments.json else f"{keys.path}\n{_table(found)}")


def update(arguments: argparse.Namespace) -> None:
    given = {column: getattr(arguments, column) for column in ("name", "rate_limit", "expires")}
    changes = {column: value for column, value in given.items() if value is not None}
    if "expires" in changes:
        changes["expires"] = _end(arguments.expires)
    if not changes:
        raise SetupError("nothing to change: give --rate-limit, --name or --expires")
    with closing(KeyStore(arguments.db, create=False)) as keys:
        print(_table([keys.update(_reference(arguments.key), **changes)]))


def rotate(arguments: argparse.Namespace) -> None:
    with closing(KeyStore(arguments.db, create=False)) as keys:
        key, secret = keys.rotate(_reference(arguments.key), arguments.grace)
    print(secret)
    end = time.strftime("ends on %Y-%m-%d at %H:%M", time.localtime(time.time() + arguments.grace))
    end = end if arguments.grace else "has ended"
    print(f"phi3v: that is key {key.id} ({key.name}) now, shown only this once; the one before {end}", file=sys.stderr)


def delete(arguments: argparse.Namespace) -> None:
    with closing(KeyStore(arguments.db, create=False)) as keys:
        key = keys.delete(_reference(arguments.key))
    print(f"deleted {key.id} ({key.name})")


def quantize(arguments: argparse.Namespace) -> None:
    """Write a checkpoint with fewer bits, and say what that saved and what it changed."""
    from . import need_mlx

    need_mlx()
    from .llm import find
    from .quantize import agreement, quantize

    source, out = find(arguments.model), Path(arguments.out).resolve()
    before, after = quantize(source, out, arguments.bits, arguments.group_size, arguments.vision)
    print(f"{out}: {before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB after", flush=True)
    same, places = agreement(source, out)
    print(f"greedy agreement: the same next token at {same} of {places} places in built-in texts ({same / places:.1%})")
    print(f"to serve it: phi3v serve --model {shlex.quote(str(out))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="phi3v", description="Phi-3-Vision on MLX: a secure server and command line.")
    parser.epilog = "to begin, without a download: phi3v chat --model demo"
    parser.add_argument("--version", action="version", version=f"phi3v {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")

    def command(run, name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    count, size, duration = _kind(*COUNT), _kind(*SIZE), _kind(*TIME, never=0)
    auto_count, auto_size = _kind(*COUNT, auto=None), _kind(*SIZE, auto=None)  # None: worked out from the memory
    level = _kind(r"(?!)", "debug, info, warning or error", debug=10, info=20, warning=30, error=40)
    sub = serve_ = command(serve, "serve", "serve the model over HTTPS")
    _option(sub, "--host", "127.0.0.1", help="address to listen on; 0.0.0.0 for the whole network")
    _option(sub, "--port", 8000, type=int, help="0 for any that is free")
    _option(sub, "--allowed-host", "", type=_names(*HOST), help="further names clients call it by, with commas")
    _option(sub, "--allow-origin", "", type=_names(*ORIGIN), dest="origins", help="origins whose pages may use it")
    _option(sub, "--max-content-length", "1MB", type=size, help="largest body, such as 500KB or 1MB")
    _option(sub, "--max-chat-content-length", "20MB", type=size, help="the same, of the chat route")
    _option(sub, "--max-connections", 1024, type=count, help="the most clients at once; others are turned away")
    _option(sub, "--max-tokens", 1024, type=count, help="the most tokens of an answer that may be asked for")
    _option(sub, "--max-batch", "auto", type=auto_count, help="the most sequences that run at once")
    _option(sub, "--max-queue", 256, type=count, help="the most sequences that run or wait, 64 or more")
    _option(sub, "--max-context", "auto", type=auto_count, help="the most tokens of prompt and answer")
    _option(sub, "--cache-bytes", "auto", type=auto_size, help="memory to keep read prompts and pictures in")
    _option(sub, "--idle-unload", "never", type=duration, help="free the model after such a time without work, as 10m")
    text = "this process is one of the ranks that mlx.launch starts; they meet at this port of rank 0's (32322)"
    # The port below mlx.launch's first one.
    sub.add_argument("--tensor-parallel", type=count, nargs="?", const=32322, metavar="PORT", help=text)
    sub.set_defaults(hello=terminal.say_hello)
    sub.add_argument("--first-key", action="store_true", help="create and print a key if there is none yet")
    sub = create_ = command(create, "create", "create an API key and print it, once")
    sub.add_argument("--name", required=True, help="who or what the key is for, as `phi3v list` shows it")
    sub.add_argument("--rate-limit", type=count, default=100, help="requests per minute (100)")
    sub.add_argument("--expires", type=duration, help="how long it is valid, such as 12h or 90d (for ever)")
    sub = list_ = command(list_keys, "list", "show the keys, their limits and their use; never a key itself")
    sub.add_argument("--json", action="store_true", help="the same as JSON")
    sub = update_ = command(update, "update", "change a key's limit, name or end")
    sub.add_argument("--rate-limit", type=count, help="requests per minute")
    sub.add_argument("--name")
    sub.add_argument("--expires", type=duration, help="from now on, such as 90d; or never")
    sub = rotate_ = command(rotate, "rotate", "give a key a new secret and print it, once; all else stays")
    sub.add_argument("--grace", type=_kind(*GRACE), default=0, help="the old one is valid so long, as 24h (not at all)")
    delete_ = command(delete, "delete", "delete a key; it ends at once, also in a running server")
    sub = generate_ = command(terminal.generate, "generate", "answer in the terminal, once or for each picture")
    sub.epilog = terminal.STATUS
    sub.set_defaults(refuse=sub.error)
    sub.add_argument("prompt", help="the question, or - to read it from standard input")
    text = "a picture, or - to read it from standard input; may be repeated"
    pictures = sub.add_mutually_exclusive_group()
    pictures.add_argument("--image", action="append", default=[], metavar="FILE", help=text)
    text = "ask the same of each of these pictures, many at once: a JSON line for each as it is answered"
    pictures.add_argument("--each", nargs="+", metavar="FILE", help=text)
    text = "where --each adds its lines; what is answered there is not asked again, so that a broken run goes on"
    sub.add_argument("--out", metavar="FILE.jsonl", help=text)
    sub.add_argument("--max-tokens", type=int, help="the most tokens of an answer (512)")
    sub.add_argument("--num-crops", type=int, help="the most crops a picture is cut into, 1 to 16")
    sub.add_argument("--json", action="store_true", help="print text, finish_reason, usage, model and seconds as JSON")
    sub = chat_ = command(chat, "chat", "open the chat page in the browser; so does phi3v alone at a terminal")
    sub.set_defaults(hello=terminal.open_page)
    sub.add_argument("--no-browser", action="store_true", help="only print the page's address")
    sub = command(quantize, "quantize", "write a checkpoint with fewer bits to a weight")
    sub.add_argument("model", metavar="MODEL", help="demo, a checkpoint folder or a hub id")
    sub.add_argument("out", metavar="OUT", help="the folder to make")
    # What MLX's affine mode has on all backends, and both loaders read.
    sub.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 6, 8), help="of a weight (4)")
    sub.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128), help="weights to a scale (64)")
    sub.add_argument("--vision", action="store_true", help="the vision tower, too, which stays as it is otherwise")
    sub = bench_ = command(terminal.bench, "bench", "measure a model on this machine: a table to paste into an issue")
    sub.add_argument("--json", action="store_true", help="the same as one object")
    for sub in (update_, rotate_, delete_):
        sub.add_argument("--key", required=True, help="the key, its id, or - to read it from standard input")
    for sub in (serve_, chat_):
        _option(sub, "--certfile", "server.crt", help="made on the first run if it is not there")
        _option(sub, "--keyfile", "server.key", help="its private key")
        _option(sub, "--log-file", "server.log", help="a line for each request; 60 MB at most")
        _option(sub, "--log-level", "info", type=level, help="debug, info, warning or error")
    for sub in (serve_, chat_, generate_, bench_):
        _option(sub, "--model", MODEL, help="demo (the embedded one), a checkpoint folder or a hub id")
        _option(sub, "--adapter", "", help="the folder of a LoRA or DoRA adapter that mlx-lm has made")
    for sub in (serve_, create_, list_, update_, rotate_, delete_):
        _option(sub, "--db", "keys.db", help="the file that holds the keys")
    return parser


def _option(parser: argparse.ArgumentParser, flag: str, default: str | int, help: str, **kwargs) -> None:
    """An option whose default the environment may set: --log-file reads PHI3V_LOG_FILE."""
    variable = "PHI3V_" + flag.strip("-").upper().replace("-", "_")
    text = f"{help} ({default or 'none'}; {variable})"
    parser.add_argument(flag, default=os.environ.get(variable) or default, help=text, **kwargs)


def _kind(pattern: str, what: str, make=lambda found: int(found[1]) * UNITS[found[2].upper()], **words):
    """What argparse makes of a value: what `make` does of the match, a number times its unit, or one of `words`."""

    def kind(text: str) -> int | str | None:
        found = re.fullmatch(pattern, text)
        if not found and text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return make(found) if found else words[text]

    return kind


def _names(pattern: str, what: str):
    """What argparse makes of names with commas between."""
    one = _kind(pattern, what, re.Match.group)
    return lambda text: [one(name.strip().lower()) for name in text.split(",") if name.strip()]


def _end(seconds: int | None) -> float | None:
    """When a key ends that is valid so long; None and 0, which stands for "never", are for ever."""
    return time.time() + seconds if seconds else None


def _reference(key: str) -> str:
    """What --key named; - keeps the key out of `ps` and of the shell's history."""
    given = sys.stdin.buffer.readline() if key == "-" else os.fsencode(key)
    return given.decode(errors="replace").strip()  # an argument that is no UTF-8 must not be a traceback


def _table(keys: list[Key]) -> str:
    rows = [["ID", "NAME", "KEY", "LIMIT/MIN", "CREATED", "EXPIRES", "LAST USED", "REQUESTS", "TOKENS"]]
    for k in keys:
        tokens = f"{k.prompt_tokens}+{k.completion_tokens}"
        times = k.created, k.expires, k.last_used
        dates = ["–" if t is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(t)) for t in times]
        rows.append([k.id, k.name, k.prefix + "…", str(k.rate_limit), *dates, str(k.requests), tokens])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


class _Formatter(logging.Formatter):
    """Says of an exception where it happened, but not its words: they may be a client's."""

    def formatException(self, exc_info: tuple) -> str:
        lines, error = [], exc_info[1]
        while error:
            lines = [*traceback.format_tb(error.__traceback__), f"{type(error).__name__}\n", *lines]
            error = error.__cause__ or error.__context__
        return "".join(lines)


def _warn_on_stderr() -> None:
    log.addHandler(console := logging.StreamHandler())
    console.setLevel(logging.WARNING)
    console.setFormatter(_Formatter("phi3v: %(message)s"))


def _start_log(arguments: argparse.Namespace) -> Path | None:
    """Everything to the log file, warnings to stderr as well; returns the file, None if it cannot be written."""
    logging.raiseExceptions = False  # a full disk must cost lines of the log, not a traceback for each
    warnings.filterwarnings("ignore", module="PIL")  # they quote what clients sent, a line for each new wording
    log.setLevel(arguments.log_level)
    _warn_on_stderr()
    try:
        file = logging.handlers.RotatingFileHandler(arguments.log_file, encoding="utf-8", **ROTATED)
    except OSError as error:
        log.warning("cannot write %s: %s; serving without a log file", arguments.log_file, error.strerror)
        return None
    file.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    return Path(file.baseFilename)


if __name__ == "__main__":
    sys.exit(main())

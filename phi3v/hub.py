"""A hub id → the folder of its files: the one in Hugging Face's cache, or what is downloaded into it now.

Knows the hub and the layout of its cache, nothing of what is in the files but that they are whole. A model that is here
is used as it is, without asking the hub. huggingface_hub would forget a download that was cut; here it goes on.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_session
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # HTTPError: httpx's, or httpx2's
from huggingface_hub.utils import build_hf_headers

from .errors import SetupError
from .model import progress, weight_files

# All that is ever fetched, and from the top folder only: no code, no pickles.
WANTED = r"(?a)((preprocessor_|generation_)?config|tokenizer|model\.safetensors\.index)\.json|[\w.-]+\.safetensors"
HASH = r"[0-9a-f]{40}|[0-9a-f]{64}"  # git's of small files and of commits, SHA-256 of large files
PAUSES = 1, 2, 4, 8  # seconds before each further try, counted anew when one has brought something: a router restarts
LOOPBACK = "localhost", "127.0.0.1", "::1"
SPARE = 100_000_000  # bytes of the disk that a download leaves free
DEMO = "or try --model demo, which needs no download"


def find(name: str) -> Path:
    """The folder with the files of `name`, owner/model; downloaded if they are not all here. Raises SetupError."""
    root, hub = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}", constants.ENDPOINT
    try:
        if folder := _cached(root):
            return folder
        return _download(name, root)
    except OfflineModeIsEnabled:
        message = f"{name} is not whole on this machine, and HF_HUB_OFFLINE is set: unset it, {DEMO}"
    except HfHubHTTPError as error:
        message = _refusal(name, hub, error.response)
    except HTTPError as error:
        kept = "what has come is kept and the same command goes on from there"
        message = f"{name} is not here, and {hub} does not answer ({type(error).__name__}): {kept}; {DEMO}"
    except OSError as error:
        full = error.errno == errno.ENOSPC
        advice = "make room and start again: it goes on from there" if full else "let HF_HOME name another place"
        message = f"cannot write {name} into {root.parent}: {error.strerror or error}; {advice}"
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        message = f"{hub} does not answer as the hub does ({type(error).__name__}): is HF_ENDPOINT right? {DEMO}"
    raise SetupError(message)


def _cached(root: Path) -> Path | None:
    """The snapshot that `main` last was, if all its files are here: a download of others may have been cut."""
    try:
        folder = root / "snapshots" / (root / "refs" / "main").read_text().strip()
        weight_files(folder)
    except (OSError, SetupError):
        return None
    return folder if (folder / "config.json").exists() and (folder / "tokenizer.json").exists() else None


def _token() -> bool | None:
    """For huggingface_hub, which takes None for the user's own: False where others on the way could read it."""
    url = urlsplit(constants.ENDPOINT)
    return None if url.scheme == "https" or url.hostname in LOOPBACK else False


def _refusal(name: str, hub: str, response) -> str:
    status, code = response.status_code, response.headers.get("X-Error-Code")
    if status in (401, 403, 404) and _token() is False:
        return f"{hub} does not show {name} to strangers, and over plain http HF_TOKEN is not sent: use https; {DEMO}"
    if status == 403 or code == "GatedRepo":
        return f"{name} is for those who were granted access: ask at {hub}/{name}, then set HF_TOKEN"
    if status in (401, 404):
        advice = "check the name, and HF_TOKEN if it is private or your token has ended"
        return f"there is no {name} at {hub} that you may read: {advice}; {DEMO}"
    return f"{hub} has trouble with {name} (status {status}): try again later, what has come is kept; {DEMO}"


def _download(name: str, root: Path) -> Path:
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    info = HfApi(token=_token()).model_info(name, revision="main", files_metadata=True, timeout=timeout)
    _check(name, info)
    folder, blobs = root / "snapshots" / info.sha, root / "blobs"
    wanted = [file for file in info.siblings if re.fullmatch(WANTED, file.rfilename)]
    hashes = [file.lfs.sha256 if file.lfs else file.blob_id for file in wanted]
    if not all(re.fullmatch(HASH, text) for text in (info.sha, *hashes)):
        raise ValueError("a hash")  # it would be a path of the hub's choice
    files = {f.rfilename: (blobs / text, f.size) for f, text in zip(wanted, hashes, strict=True)}
    missing = {f: at for f, at in files.items() if at[1] not in (_size(folder / f), _size(at[0]))}
    size, have = sum(size for _, size in missing.values()), sum(_size(_part(blob)) for blob, _ in missing.values())
    free = shutil.disk_usage(next(p for p in (root, *root.parents) if p.exists())).free
    if size - have + SPARE > free:
        room = f"{(size - have) / 1e9:.2f} GB to download and {free / 1e9:.2f} GB are free in {root.parent}"
        raise SetupError(f"{name} has {room}: make room, or let HF_HOME name a larger disk; {DEMO}")
    if missing:
        there = f", {have / 1e9:.2f} GB of it are here" if have else ""
        where = f"into {root.parent}, {free / 1e9:.0f} GB free; after Ctrl-C the same command goes on"
        print(f"phi3v: downloading {name}: {size / 1e9:.2f} GB{there}, {where}", file=sys.stderr, flush=True)
    blobs.mkdir(parents=True, exist_ok=True)
    with progress(f"downloading {name}", size, have) as advance:
        for file, (blob, length) in sorted(missing.items(), key=lambda each: each[1][1]):  # the small ones first
            url = f"{constants.ENDPOINT}/{name}/resolve/{info.sha}/{file}"
            _fetch(f"{file} of {name}", url, blob, length, advance)
    _link(folder, {file: blob for file, (blob, _) in files.items()})
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(info.sha)
    return folder


def _check(name: str, info) -> None:
    """Refuse what cannot be a model for us before it takes an hour and a disk."""
    there = [file.rfilename for file in info.siblings]
    kind = (info.config or {}).get("model_type", "phi3_v")
    if kind != "phi3_v":
        raise SetupError(f"{name} has model_type {kind!r}; phi3v runs 'phi3_v' only")
    if lacking := [file for file in ("config.json", "tokenizer.json") if file not in there]:
        raise SetupError(f"{name} has no {lacking[0]} on the hub: it is no checkpoint that phi3v can run")
    if not any(re.fullmatch(WANTED, file) and file.endswith(".safetensors") for file in there):
        others = [file for file in there if file.endswith((".bin", ".pt", ".pth", ".gguf", ".npz"))]
        given = f", only {others[0]}" if others else ""
        raise SetupError(f"{name} has no .safetensors file on the hub{given}: phi3v reads no other format, {DEMO}")


def _part(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.phi3v.incomplete")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch(what: str, url: str, blob: Path, size: int, advance: Callable[[int], None]) -> None:
    """Download a file, on from where it was cut; it gets its name in the cache once its hash is right."""
    part, tries = _part(blob), 0
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SetupError(f"another process is downloading {what}: wait for it, then start again") from None
        while (have := file.seek(0, os.SEEK_END)) < size:
            try:
                _append(url, file, have, size, advance)
            except HTTPError as error:
                tries = 0 if file.seek(0, os.SEEK_END) > have else tries
                if isinstance(error, HfHubHTTPError) or tries == len(PAUSES):  # the first: a refusal
                    raise
                time.sleep(PAUSES[tries])
                tries += 1
        with open(part, "rb") as written:
            git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
            digest = hashlib.file_digest(written, hashlib.sha256 if len(blob.name) == 64 else lambda: git)
        if digest.hexdigest() != blob.name:
            part.unlink()
            advice = "it was removed; start again, and if it happens again the hub's file is damaged"
            raise SetupError(f"{what} did not arrive with the hub's checksum: {advice}")
        part.replace(blob)


def _append(url: str, file, have: int, size: int, advance: Callable[[int], None]) -> None:
    headers = build_hf_headers(token=_token()) | {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        if response.is_error:  # its body is not looked at: it could have no end
            raise HfHubHTTPError("refused", response=response)
        if response.status_code == 200 and have:  # all of it comes again
            file.truncate(0)
            advance(-have)
            have = 0
        for chunk in response.iter_bytes():  # as they come: what waits for a whole piece is lost by a cut
            have += file.write(chunk)
            advance(len(chunk))
            if have >= size:
                return
    raise HTTPError("the answer ended early")


def _link(folder: Path, files: dict[str, Path]) -> None:
    """The snapshot as huggingface_hub lays it out: links to blobs, or the files themselves where links cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, blob in files.items():
        place = folder / file
        if place.exists():
            continue
        place.unlink(missing_ok=True)  # a link to nothing
        try:
            place.symlink_to(Path("..", "..", "blobs", blob.name))
        except OSError:
            blob.replace(place)

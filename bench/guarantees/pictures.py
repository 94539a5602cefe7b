"""What pictures may cost, and what damaged ones may do: the figures of part E of what the server guarantees.

    python bench/guarantees/pictures.py --count 100000

Three sets, each picture in a process of its own, where CPU seconds and the peak of memory above the base are measured:
the largest pictures that are allowed, bombs, which must all be refused, and mutated files in chunks. Nothing but a
RequestError may come of any of them. Prints one JSON object; exit status 1 if a figure is over its limit.
"""

import argparse
import io
import json
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from phi3v import images
from phi3v.errors import RequestError

LARGEST_CPU_S, LARGEST_MB, BOMB_CPU_MS, BOMB_MB = 1, 300, 200, 100
CHUNK = 2_000  # mutated files of one process


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    more = [frame.copy() for frame in options.pop("append_images", [])]  # a frame remembers how it was saved last
    image.save(buffer, kind, append_images=more, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG's."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff(data: bytes, **tags: tuple[int, int, int]) -> bytes:
    """A grey one of 50 × 50 with these tags, such as t259=(type, count, value), and the data behind them at 8 bytes."""
    own = {256: (4, 1, 50), 257: (4, 1, 50), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 8)}
    own |= {277: (3, 1, 1), 278: (4, 1, 50), 279: (4, 1, len(data))} | {int(k[1:]): v for k, v in tags.items()}
    entries = b"".join(struct.pack("<HHII", tag, *own[tag]) for tag in sorted(own))
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(own)) + entries + bytes(4)


def scans(jpeg: bytes, times: int) -> bytes:
    """A progressive JPEG that says its last scan again and again."""
    return jpeg[:-2] + jpeg[jpeg.rfind(b"\xff\xda") : -2] * times + jpeg[-2:]


def noise(width: int, height: int, channels: int) -> np.ndarray:
    """Blocks with two bits of noise in them: neither flat nor incompressible, as photos are."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 128, (height // 8 + 1, width // 8 + 1, channels), dtype=np.uint8)
    large = np.kron(blocks, np.ones((8, 8, 1), np.uint8))[:height, :width]
    return large + rng.integers(0, 4, large.shape, dtype=np.uint8)


def largest() -> Iterator[tuple[str, bytes]]:
    """Pictures at the limits, lying on their side where that costs a copy; tall ones are turned once more."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = noise(4100, 3900, 4)
    rgba, rgb, palette = Image.fromarray(pixels), Image.fromarray(pixels[..., :3]), None
    yield "RGBA PNG", encoded(rgba, "PNG", compress_level=1, exif=exif)
    yield "RGB PNG", encoded(rgb, "PNG", compress_level=1)
    yield "lossless WebP", encoded(rgba, "WEBP", lossless=True, quality=0, method=0, exif=exif)
    yield "WebP", encoded(rgba, "WEBP", quality=95, method=1, exif=exif)
    palette = rgb.quantize(256)
    yield "palette PNG with transparency", encoded(palette, "PNG", transparency=bytes(range(256)))
    yield "GIF with transparency", encoded(palette, "GIF", transparency=3)
    yield "BMP", encoded(rgb, "BMP")
    grey = Image.fromarray(pixels[..., 0].astype(np.uint16) * 511)
    yield "16-bit PNG", encoded(grey, "PNG", compress_level=1, exif=exif)
    yield "16-bit TIFF", encoded(grey, "TIFF")
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg", "zstd"):
        yield f"RGBA TIFF, {compression}", encoded(rgba, "TIFF", compression=compression, exif=exif)
    yield "CMYK TIFF", encoded(Image.frombytes("CMYK", rgba.size, pixels.tobytes()), "TIFF")
    yield "bilevel TIFF, group4", encoded(rgb.convert("1"), "TIFF", compression="group4")
    pixels = noise(8000, 8000, 3)
    photo = Image.fromarray(pixels)
    yield "64 MP JPEG", encoded(photo, "JPEG", quality=95, subsampling=0, exif=exif)
    yield "64 MP progressive JPEG", encoded(photo, "JPEG", quality=75, progressive=True, exif=exif)
    yield "64 MP CMYK JPEG", encoded(Image.merge("CMYK", [*photo.split(), photo.split()[0]]), "JPEG", exif=exif)
    grey = encoded(Image.new("L", (8000, 8000), 200), "JPEG", progressive=True)
    yield "64 MP JPEG of 24 scans", scans(grey, 24 - grey.count(b"\xff\xda"))


def over() -> Iterator[tuple[str, bytes]]:
    """Just over the limits, and far over them."""
    for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF"):
        yield f"16.004 MP {kind}", encoded(Image.new("L", (4001, 4000)), kind)
    yield "64.008 MP JPEG", encoded(Image.new("L", (8001, 8000)), "JPEG")
    yield "177 MP 1-bit PNG", encoded(Image.new("1", (13300, 13300)), "PNG")
    flat = Image.new("RGB", (8000, 8000), (200, 90, 30))
    yield "64 MP JPEG of 64 scans", scans(encoded(flat, "JPEG", progressive=True), 54)
    yield "64 MP progressive 4:4:4", encoded(flat, "JPEG", progressive=True, subsampling=0)
    yield "JPEG of 109 scans", scans(encoded(Image.new("RGB", (400, 400)), "JPEG", progressive=True), 99)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 5000, 5000, 0) + b"\2\1\0\0"
    yield "GIF of 200 frames", b"GIF89a" + struct.pack("<HHBBB", 5000, 5000, 0x80, 0, 0) + bytes(6) + frame * 200 + b";"
    yield "GIF frame beyond it", b"GIF89a" + struct.pack("<HHBBB", 50, 50, 0x80, 0, 0) + bytes(6) + frame + b";"
    frames = [Image.new("RGB", (90, 90), (k, k, 0)) for k in range(200)]
    film = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    yield "WebP animation, 268 MP", film[:24] + (16382).to_bytes(3, "little") * 2 + film[30:]
    film = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    yield (
        "animated PNG, 2 ** 62 pixels",
        film[:8] + chunk(b"IHDR", struct.pack(">II", 2**31 - 1, 2**31 - 1) + film[24:29]) + film[33:],
    )


def crafted() -> Iterator[tuple[str, bytes]]:
    """Small files of which the wrong reader makes much."""
    png, jpeg, gif, bmp = (encoded(Image.new("RGB", (50, 50), "red"), kind) for kind in ("PNG", "JPEG", "GIF", "BMP"))
    zeros = zlib.compress(bytes(100_000_000), 9)
    yield "PNG, zTXt of 100 MB", png[:33] + chunk(b"zTXt", b"a\0\0" + zeros) + png[33:]
    yield "PNG, iTXt of 100 MB", png[:33] + chunk(b"iTXt", b"a\0\1\0\0\0" + zeros) + png[33:]
    yield "PNG, iCCP of 100 MB", png[:33] + chunk(b"iCCP", b"a\0\0" + zeros) + png[33:]
    yield (
        "PNG, 70 texts of 1 MB",
        png[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20), 9)) * 70 + png[33:],
    )
    yield "PNG of 10⁶ chunks", png[:33] + chunk(b"teSt", b"") * 1_000_000 + png[33:]
    yield "PNG with 10⁶ chunks behind", png[:-12] + chunk(b"teSt", b"") * 1_000_000 + png[-12:]
    yield "PNG of empty IDATs", png[:33] + chunk(b"IDAT", b"") * 1_000_000 + png[33:]
    yield "JPEG of 10⁷ fill bytes", jpeg[:2] + b"\xff" * 10_000_000 + jpeg[2:]
    yield "JPEG of 10⁶ comments", jpeg[:2] + b"\xff\xfe\0\2" * 1_000_000 + jpeg[2:]
    at = gif.index(b",\0\0\0\0")
    yield "GIF of 10⁶ comments", gif[:at] + b"!\xfe\1a\0" * 1_000_000 + gif[at:]
    yield "TIFF 2³¹ wide", tiff(bytes(2500), t256=(4, 1, 2**31 - 1))
    yield "TIFF of 4·10⁹ samples a pixel", tiff(bytes(2500), t277=(4, 1, 4_000_000_000))
    for name, tags in {
        "strips": {"t273": (4, 3_500_000, 8), "t278": (4, 1, 1)},
        "strips in bytes": {"t273": (1, 14_000_000, 8), "t278": (4, 1, 1)},
        "fractions": {"t282": (5, 1_750_000, 8)},
        "colours": {"t262": (3, 1, 3), "t320": (1, 14_000_000, 8)},
    }.items():
        yield f"TIFF of many {name}", tiff(bytes(14_000_000), **tags)
    yield "BigTIFF", b"II+\0\b\0\0\0\x10" + bytes(99)
    yield "TIFF of 30,000 tags", tiff(bytes(400_000), **{f"t{k}": (1, 390_000, 8) for k in range(33_000, 63_000)})
    lies = tiff(bytes(14_000_000), t274=(5, 1_750_000, 8))
    yield "PNG with EXIF of 14 MB", png[:33] + chunk(b"eXIf", lies) + png[33:]
    yield "WebP with EXIF of 14 MB", encoded(Image.new("RGB", (50, 50)), "WEBP", exif=b"Exif\0\0" + lies)
    tile = {"t322": (4, 1, 60_000), "t323": (4, 1, 60_000), "t324": (4, 1, 8), "t325": (4, 1, len(zeros))}
    yield "TIFF tile of 3.6 gigapixels", tiff(zeros, t259=(3, 1, 8), **tile)
    yield "BMP 2³¹ wide", bmp[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + bmp[26:]
    yield "BMP with a header of 4 GB", bmp[:14] + struct.pack("<I", 2**32 - 1) + bmp[18:]
    yield "BMP of 4·10⁹ colours", bmp[:28] + struct.pack("<H", 8) + bmp[30:46] + struct.pack("<I", 2**32 - 1) + bmp[50:]
    head = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 1078) + struct.pack(
        "<IiiHHIIiiII", 40, 4000, 4000, 1, 8, 1, 0, 0, 0, 256, 0
    )
    yield "BMP of 10⁷ runs", head + bytes(1024) + b"\1\1" * 10_000_000


def cut() -> Iterator[tuple[str, bytes]]:
    photo = Image.fromarray(noise(4000, 4000, 3))
    for kind in images.FORMATS:
        data = encoded(photo, kind)
        yield f"half a {kind}", data[: len(data) // 2]
    data = encoded(photo, "JPEG", progressive=True)
    yield "half a progressive JPEG", data[: len(data) // 2]


def bombs() -> Iterator[tuple[str, bytes]]:
    yield from over()
    yield from crafted()
    yield from cut()


def originals() -> list[bytes]:
    """Small pictures of every format and of the variants that have code of their own."""
    rgba = Image.fromarray(noise(50, 40, 4))
    rgb, grey, exif = rgba.convert("RGB"), rgba.convert("L"), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    films = {"save_all": True, "append_images": [rgb.transpose(Image.Transpose.ROTATE_180)]}
    made = [encoded(rgb, kind) for kind in images.FORMATS]
    made += [
        encoded(rgba, "PNG", exif=exif),
        encoded(rgb.quantize(16), "PNG", transparency=3),
        encoded(rgb, "PNG", **films),
    ]
    made += [
        encoded(rgb, "JPEG", progressive=True, exif=exif),
        encoded(rgba.convert("CMYK"), "JPEG"),
        encoded(rgb, "MPO", **films),
    ]
    made += [encoded(rgba, "WEBP", exif=exif), encoded(rgba, "WEBP", lossless=True), encoded(rgb, "WEBP", **films)]
    made += [encoded(rgb, "GIF", transparency=3, **films), encoded(grey, "BMP"), encoded(grey.convert("1"), "BMP")]
    made += [
        encoded(rgb, "TIFF", compression=name, exif=exif)
        for name in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "lzma", "zstd")
    ]
    made += [encoded(grey.convert("1"), "TIFF", compression=name) for name in ("group3", "group4", "tiff_ccitt")]
    return [
        *made,
        encoded(Image.fromarray(noise(50, 40, 1)[..., 0].astype(np.uint16) * 500), "TIFF"),
        encoded(rgb, "TIFF", **films),
    ]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes set, cut out, doubled or put in; of a PNG the checksums are made right again, mostly."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 64))
        at = rng.randrange(min(len(data), 200) + 1) if rng.random() < 0.5 else at  # headers are where the code is
        change = rng.randrange(6)
        if change < 3:
            data[at : at + length] = [
                rng.choice((0, 1, 127, 128, 255, rng.randrange(256))) for _ in range(min(length, 4))
            ]
        elif change == 3:
            del data[at : at + length]
        elif change == 4:
            data[at:at] = data[at : at + length] * rng.choice((1, 1, 100))
        else:
            del data[rng.randrange(len(data) + 1) :]
    if data[:4] == b"\x89PNG" and rng.random() < 0.8:
        at = 8
        while at + 12 <= len(data) and (end := at + 8 + int.from_bytes(data[at : at + 4], "big")) + 4 <= len(data):
            data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
            at = end + 4
    return bytes(data)


def attempt(data: bytes) -> str:
    """What a picture is answered: "" if it is read."""
    try:
        images.Header(data, 16).crops()
    except RequestError as error:
        return error.message
    return ""


def peak() -> float:
    """The most memory of this process so far, in MB."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return (
        next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM")) * 1024 / 1e6
    )


def cost(path: str) -> dict:
    """Of the picture in a file, in this process."""
    data = Path(path).read_bytes()
    attempt(encoded(Image.new("RGB", (400, 300), "red"), "PNG"))
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    base, began = peak(), time.process_time()
    answer = attempt(data)
    return {"cpu_s": round(time.process_time() - began, 3), "mb": round(peak() - base, 1), "answer": answer}


def mutate(seed: int, first: int, last: int) -> dict:
    """Read the mutated files of these numbers; what is raised besides RequestError is a crash."""
    images.process = lambda image, num_crops: None  # what is decoded is a plain picture, and cutting it takes long
    made, read, crashes = originals(), 0, []
    for number in range(first, last):
        rng = random.Random(f"{seed} {number}")
        try:
            read += not attempt(mutated(rng.choice(made), rng))
        except Exception as error:
            crashes.append(f"{number}: {error!r}")
    return {"read": read, "crashes": crashes}


def child(*arguments) -> tuple[dict | None, str]:
    """What a process of this file prints, or None if it died, and what it wrote to stderr."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return json.loads(done.stdout) if done.returncode == 0 else None, done.stderr


def costs(pictures: Iterator[tuple[str, bytes]], folder: str) -> dict[str, dict]:
    found = {}
    for name, data in pictures:
        path = os.path.join(folder, "picture")
        Path(path).write_bytes(data)
        told, printed = child("--cost", path)
        found[name] = (told or {"cpu_s": -1, "mb": -1, "answer": "died"}) | {
            "kb": len(data) // 1000,
            "printed": printed,
        }
        print(f"{name}: {found[name]}", file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000, help="mutated files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cost", help=argparse.SUPPRESS)
    parser.add_argument("--mutate", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cost or arguments.mutate:
        print(json.dumps(cost(arguments.cost) if arguments.cost else mutate(arguments.seed, *arguments.mutate)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        large, bomb = costs(largest(), folder), costs(bombs(), folder)
    spans = [(first, min(first + CHUNK, arguments.count)) for first in range(0, arguments.count, CHUNK)]
    with ThreadPoolExecutor(arguments.processes) as pool:
        chunks = list(pool.map(lambda span: child("--seed", arguments.seed, "--mutate", *span), spans))
    died = [f"a process died between {span}" for span, (told, _) in zip(spans, chunks, strict=True) if told is None]
    figures = {
        "mutated": arguments.count,
        "mutated_read": sum(told["read"] for told, _ in chunks if told),
        "mutated_crashes": len(crashes := died + [c for told, _ in chunks if told for c in told["crashes"]]),
        "printed_bytes": sum(len(printed) for _, printed in chunks)
        + sum(len(found["printed"]) for found in [*large.values(), *bomb.values()]),
        "largest": len(large),
        "largest_cpu_s": max(found["cpu_s"] for found in large.values()),
        "largest_mb": max(found["mb"] for found in large.values()),
        "largest_refused": sorted(name for name, found in large.items() if found["answer"]),
        "bombs": len(bomb),
        "bomb_cpu_ms": round(1000 * max(found["cpu_s"] for found in bomb.values())),
        "bomb_mb": max(found["mb"] for found in bomb.values()),
        "bombs_read": sorted(name for name, found in bomb.items() if not found["answer"]),
    }
    print(*crashes, sep="\n", file=sys.stderr)
    print(json.dumps(figures, indent=1, ensure_ascii=False))
    over_limit = [
        figures["mutated_crashes"],
        figures["printed_bytes"],
        figures["largest_refused"],
        figures["bombs_read"],
    ]
    over_limit += [figures["largest_cpu_s"] > LARGEST_CPU_S, figures["largest_mb"] > LARGEST_MB]
    return int(any([*over_limit, figures["bomb_cpu_ms"] > BOMB_CPU_MS, figures["bomb_mb"] > BOMB_MB]))


if __name__ == "__main__":
    sys.exit(main())

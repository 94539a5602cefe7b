"""Image bytes → HD crops, as Phi-3-vision's own preprocessor makes them (numpy and Pillow only).

Knows nothing of tokens' text or of the model. Size and kind are checked on the header, before decoding. On macOS the
program `sips` makes JPEGs of HEIC files, of what is named by a path and never of what came over the wire.
"""

import ctypes
import hashlib
import io
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from .errors import RequestError
from .request import image_bytes

SIDE = 336  # pixels of a crop's side, CLIP ViT-L/14-336
TOKENS = 144  # a crop's tokens: 24 × 24 patches, merged 2 × 2
ROW = 12  # tokens of a crop's row; every row of the assembled picture ends with a separator
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # SVG and EPS run programs, the rest nobody sends
MAX_SIDE = 16_384  # pixels
MAX_ASPECT = 50  # beyond it a picture is a line after the HD transform
MAX_PIXELS = 16_000_000  # decoded at 3 or 4 bytes, and once more when its mode or orientation changes
MAX_JPEG_PIXELS = 64_000_000  # phones make 48-megapixel JPEGs, which libjpeg scales down while decoding
MAX_SAMPLES = 96_000_000  # of a progressive JPEG, which are kept at 2 bytes each: 64 megapixels in 4:2:0
MAX_SCANS = 16  # of such a JPEG, 64 of a smaller one; 10 are usual, and each goes over the whole picture
MAX_READS = 30_000  # of a file: a million small parts take seconds, the largest PNG in parts of 8 KB is 25,000
MAX_FILE = 256_000_000  # bytes: twice a TIFF of the most pixels; /dev/zero has no end
MAX_EXIF = 500_000  # bytes, of which a JPEG holds 65,536 in one piece
HEIF = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis"}  # ISO 23008-12, AVIF
SIPS_TIMEOUT = 30  # seconds; a phone's photograph takes one
BYTES = (1, 2, 6, 7)  # those types of a TIFF's tags that may be long
# What is wrong with a picture is told to its sender; Pillow and libtiff would print it as well.
warnings.filterwarnings("ignore", module=r"PIL\.")
TiffImagePlugin.logger.disabled = True
with suppress(AttributeError):  # a Pillow without libtiff, or with a static one
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)
# OpenAI's CLIP statistics, RGB, the same in every Phi-3-vision preprocessor_config.json
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclass(frozen=True)
class Crops:
    """`pixels` (1 + rows·columns, 3, 336, 336) float32, the global view first; `grid` is (rows, columns).

    `digest` is equal for two pictures whose crops are: 64 bits of SHA-256, below 0 as no token id is.
    """

    pixels: np.ndarray
    grid: tuple[int, int]
    digest: int

    @property
    def tokens(self) -> int:
        return token_count(*self.grid)


def token_count(rows: int, columns: int) -> int:
    """The image slots of a grid: its crops and the global one, a separator per row, one between both."""
    return (rows * columns + 1) * TOKENS + 1 + (rows + 1) * ROW


def hd_size(width: int, height: int, num_crops: int) -> tuple[int, int]:
    """What a picture, width ≥ height, is resized to so that it fills at most `num_crops` crops once it is padded.

    Source: HD_transform in Microsoft's image_processing_phi3_v.py.
    """
    ratio, scale = width / height, 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= num_crops:
        scale += 1
    # In this order: width·336·scale/height rounds to another row now and then.
    size = scale * SIDE, int(scale * SIDE / ratio)
    if size[1] == 0:
        raise RequestError(f"a picture of {width}×{height} pixels is too narrow: nothing is left of it in {size[0]}")
    return size


class Header:
    """A picture of which the header was checked, and nothing is decoded: bytes, a path, a data: URL or a PIL image.

    `tokens` are its image slots, `pixels` those of the file. Raises RequestError or, for a path, OSError.
    """

    def __init__(self, source, num_crops: int, param: str = "images"):
        if isinstance(source, str) and source[:5].lower() == "data:":
            source = image_bytes(source, param)
        elif isinstance(source, str | os.PathLike):
            source = _read(Path(source), param)
        if not isinstance(source, bytes | bytearray | memoryview | Image.Image):
            raise TypeError(f"a picture is a path, bytes, a data: URL or a PIL image, not {type(source).__name__}")
        self._num_crops, self._param = num_crops, param
        with _told(param):
            self._image = image = source if isinstance(source, Image.Image) else _open(bytes(source))
            may_be_large = image is source or image.format in ("JPEG", "MPO")  # MPO: a JPEG with a second one behind it
            _check_size(*image.size, MAX_JPEG_PIXELS if may_be_large else MAX_PIXELS)
            self.pixels = math.prod(image.size)
            if image is not source and self.pixels > MAX_PIXELS:
                image.draft("RGB", (image.width // 2, image.height // 2))  # changes pixels, so only when it must
            lies = Image.Image.getexif(image).get(0x0112) in (5, 6, 7, 8)  # not a PNG's own getexif, which decodes it
            self._size = image.size[::-1] if lies and image.format != "TIFF" else image.size  # a TIFF's says it already
            width, height = hd_size(max(self._size), min(self._size), num_crops)
            grid = math.ceil(height / SIDE), width // SIDE
            self.tokens = token_count(*grid if self._size[0] >= self._size[1] else grid[::-1])

    def crops(self) -> Crops:
        """Decode and cut it, once only: what is decoded is not kept, and each copy of it has 64 MB."""
        image, self._image = self._image, None
        with _told(self._param):
            image.seek(0)  # the first frame of an animation
            image = ImageOps.exif_transpose(image)  # a phone's photo lies on its side until this is applied
            if image.size != self._size:
                raise RequestError("the picture says in two places how it lies, and not the same: save it again")
            image = _to_rgb(image)
        return process(image, self._num_crops)


@contextmanager
def _told(param: str) -> Iterator[None]:
    """Pillow's decoders raise whatever the bytes lead them to, and its words may leak addresses."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = "the picture cannot be decoded: it is damaged or cut off"
        if isinstance(error, RequestError):
            reason = error.message
        elif isinstance(error, UnidentifiedImageError):
            reason = f"the picture is none of {', '.join(FORMATS)}"
        elif isinstance(error, Image.DecompressionBombError):  # over twice what Pillow itself finds safe
            reason = f"the picture has far over {MAX_JPEG_PIXELS / 1e6:.0f} megapixels"
        raise RequestError(f"{param}: {reason}", param) from error


def process(image: Image.Image, num_crops: int) -> Crops:
    """The HD transform: resize to fill the grid, pad with white, cut into crops, and a bicubic global view."""
    tall = image.width < image.height
    if tall:  # the reference works on the transposed picture, and Pillow's two passes do not commute
        image = image.transpose(Image.Transpose.TRANSPOSE)
    width, height = hd_size(*image.size, num_crops)
    canvas = Image.new("RGB", (width, math.ceil(height / SIDE) * SIDE), (255, 255, 255))
    canvas.paste(image.resize((width, height), Image.Resampling.BILINEAR), (0, (canvas.height - height) // 2))
    if tall:
        canvas = canvas.transpose(Image.Transpose.TRANSPOSE)
    pixels = ((np.asarray(canvas, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)  # (3, H, W)
    rows, columns = canvas.height // SIDE, canvas.width // SIDE
    tiles = pixels.reshape(3, rows, SIDE, columns, SIDE).transpose(1, 3, 0, 2, 4).reshape(-1, 3, SIDE, SIDE)
    # The canvas has a quarter of the floats' bytes, and all that the crops depend on.
    digest = hashlib.sha256(f"{canvas.size}".encode() + canvas.tobytes()).digest()
    digest = int.from_bytes(digest[:8], "big", signed=True) | -(2**63)
    return Crops(np.concatenate([_global_view(pixels)[None], tiles]), (rows, columns), digest)


def _global_view(pixels: np.ndarray) -> np.ndarray:
    """(3, H, W) → (3, 336, 336), torch's interpolate(mode='bicubic', align_corners=False): not antialiased."""
    for axis in (2, 1):
        taps, weights = _bicubic(pixels.shape[axis])
        shape = [1, 1, 1, 1]
        shape[axis : axis + 2] = weights.shape
        pixels = (pixels.take(taps, axis) * weights.reshape(shape)).sum(axis + 1)
    return pixels.astype(np.float32)


def _bicubic(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The four source indices and weights of each of 336 outputs: Keys' kernel with a = −0.75, as torch has it."""
    a, source = -0.75, (np.arange(SIDE) + 0.5) * (size / SIDE) - 0.5
    taps = np.floor(source)[:, None] + np.arange(-1, 3)
    distance = abs(source[:, None] - taps)
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    weights = np.where(distance <= 1, near, far).astype(np.float32)
    return taps.clip(0, size - 1).astype(int), weights


def _heif(source: bytes) -> str | None:
    """Whether the brands in a file's first box say HEIC or AVIF."""
    box = source[: min(int.from_bytes(source[:4]), 256)]
    found = box[4:8] == b"ftyp" and {box[i : i + 4] for i in range(8, len(box), 4)} & HEIF
    return found and ("AVIF" if found & {b"avif", b"avis"} else "HEIC")


def _read(path: Path, param: str) -> bytes:
    """A file's bytes; on macOS those of a JPEG if it is a HEIC or AVIF."""
    with path.open("rb") as file:
        source = file.read(MAX_FILE + 1)
    if len(source) > MAX_FILE:
        raise RequestError(f"{param}: the file has over {MAX_FILE:,} bytes", param)
    if sys.platform != "darwin" or not _heif(source):
        return source
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "picture.heic"), Path(folder, "picture.jpg")
        given.write_bytes(source)  # a copy: the path may be a pipe, or begin with a dash
        options = ["-s", "format", "jpeg", str(given), "--out", str(made)]
        try:
            subprocess.run(["sips", *options], capture_output=True, timeout=SIPS_TIMEOUT, check=True)
            return made.read_bytes()
        except (OSError, subprocess.SubprocessError):
            raise RequestError(f"{param}: the program `sips` could not make a JPEG of it", param) from None


class _File(io.BytesIO):
    reads = 0

    def read(self, *size: int) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise RequestError("the picture's file is in too many parts: save it again")
        return super().read(*size)


def _open(source: bytes) -> Image.Image:
    if kind := _heif(source):
        convert = "`sips -s format jpeg IN --out OUT.jpg` on a Mac or `heif-convert IN OUT.jpg` makes one"
        raise RequestError(f"{kind} is not read here: send JPEG ({convert}, an iPhone does with 'Most Compatible')")
    if source[:2] in (b"II", b"MM"):  # a TIFF: Pillow makes an object of each number, strip, tile, colour
        order = "<" if source[:2] == b"II" else ">"
        (at,) = struct.unpack_from(order + "I", source, 4)
        (tags,) = struct.unpack_from(order + "H", source, at)
        numbers = struct.iter_unpack(order + "HHII", source[at + 2 : at + 2 + 12 * tags])
        long = (tag in (273, 320, 324, 339) or kind not in BYTES for tag, kind, count, _ in numbers if count > MAX_SIDE)
        if b"+" in source[2:4] or any(long):
            raise RequestError(f"the TIFF is a BigTIFF, or has over {MAX_SIDE:,} strips: save it again")
    image = Image.open(_File(source), formats=FORMATS)
    if image.format in ("JPEG", "MPO"):
        (_, across, down, _), *_ = image.layer
        samples = math.prod(image.size) * sum(h * v for _, h, v, _ in image.layer) / (across * down)
        scans = source.count(b"\xff\xda", image.fp.tell()) + 1  # a JPEG's header ends with the first
        if scans > 1 and max(scans, MAX_SCANS) * max(samples, MAX_SAMPLES / 4) > MAX_SCANS * MAX_SAMPLES:
            work = f"{scans} scans of {samples / 1e6:.0f} million samples"
            raise RequestError(f"the JPEG has {work}, too many: save it again without progressive mode")
    elif image.format == "PNG" and (behind := re.search(rb"eXIf(?=II\*\0|MM\0\*)", source)):
        image.info.setdefault("exif", source[behind.end() :][:MAX_EXIF])  # it may say how it lies behind the pixels
    if len(image.info.get("exif") or b"") > MAX_EXIF:
        raise RequestError(f"the picture's EXIF has over {MAX_EXIF:,} bytes: save it again")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16-bit grey: Pillow would clip it to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise RequestError("pictures with 32 bits a channel have no set white: save it with 8 or 16")
    if image.has_transparency_data:
        image, white = image.convert("RGBA"), Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image.convert("RGB")


def _check_size(width: int, height: int, most: int) -> None:
    if not (1 <= min(width, height) and max(width, height) <= MAX_SIDE):
        raise RequestError(f"a picture's sides may have 1 to {MAX_SIDE} pixels, not {width}×{height}")
    if width * height > most:
        raise RequestError(f"the picture has {width * height:,} pixels, at most {most:,} may be")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise RequestError(f"a picture may be {MAX_ASPECT} times as long as wide, not {width}×{height}")

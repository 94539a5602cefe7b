"""Image bytes → HD crops, as Phi-3-vision's own preprocessor makes them (numpy and Pillow only).

Knows nothing of tokens' text or of the model. Size and kind are checked on the header, before decoding.
"""

import ctypes
import hashlib
import io
import logging
import math
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .errors import RequestError

SIDE = 336  # pixels of a crop's side, CLIP ViT-L/14-336
TOKENS = 144  # a crop's tokens: 24 × 24 patches, merged 2 × 2
ROW = 12  # tokens of a crop's row; every row of the assembled picture ends with a separator
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # SVG and EPS run programs, the rest nobody sends
MAX_SIDE = 16_384  # pixels
MAX_ASPECT = 50  # beyond it a picture is a line after the HD transform
MAX_PIXELS = 16_000_000  # decoded at 3 or 4 bytes, and once more when its mode or orientation changes
MAX_JPEG_PIXELS = 64_000_000  # phones make 48-megapixel JPEGs, which libjpeg scales down while decoding
MAX_SAMPLES = 96_000_000  # of a progressive JPEG, kept at 2 bytes each to its last scan: 64 megapixels in 4:2:0
MAX_SCANS = 16  # of such a one, and up to 64 of a smaller one; 10 are usual, and each goes over the whole picture
COMPRESSIONS = "raw packbits tiff_lzw tiff_deflate tiff_adobe_deflate jpeg group3 group4".split()  # of a TIFF
DECODES = threading.Semaphore(2)  # two decodes at once bound the memory they take
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()  # EXIF's 2 to 8
# What Pillow and libtiff find wrong with a picture is told to who sent it, and not printed.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())
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


def grid(size: tuple[int, int], num_crops: int) -> tuple[int, int]:
    """The (rows, columns) of crops that a picture of this (width, height) is cut into."""
    width, height = hd_size(max(size), min(size), num_crops)
    rows, columns = math.ceil(height / SIDE), width // SIDE
    return (rows, columns) if size[0] >= size[1] else (columns, rows)


@dataclass
class Header:
    """A picture that was checked but not decoded: its image slots, and the `pixels` of the file; its `size`
    (width, height) is what it is decoded to, upright."""

    image: Image.Image | None
    turn: Image.Transpose | None  # what sets it upright
    size: tuple[int, int]
    pixels: int
    num_crops: int
    tokens: int

    def crops(self) -> Crops:
        """The picture decoded and cut, once only: its pixels are not kept. Raises RequestError."""
        with DECODES:
            return process(self.upright(), self.num_crops)

    def upright(self) -> Image.Image:
        """The picture decoded, in RGB on white, once only. Raises RequestError."""
        image, self.image = self.image, None
        with _damage_told():
            image.seek(0)  # the first frame of an animation
            image.load()
            image = _to_rgb(image)
            image = image if self.turn is None else image.transpose(self.turn)
        if image.size != self.size:
            raise RequestError("the picture says in two places how it lies, and not the same: save it again")
        return image


def open(source, num_crops: int) -> Header:
    """What the header of bytes, a path or a PIL image says; raises RequestError or, for a path, OSError."""
    if isinstance(source, str | os.PathLike):
        source = Path(source).read_bytes()
    if not isinstance(source, bytes | bytearray | memoryview | Image.Image):
        raise TypeError(f"a picture is a path, bytes, a data: URL or a PIL image, not {type(source).__name__}")
    with _damage_told():
        image = source if isinstance(source, Image.Image) else _open(bytes(source))
        pixels = math.prod(image.size)
        if image is source:
            _check_size(*image.size, MAX_JPEG_PIXELS)
        elif pixels > MAX_PIXELS:
            image.draft("RGB", (image.width // 2, image.height // 2))  # changes pixels, so only when it must
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # a PNG's own getexif decodes it
        lies = orientation in range(2, 9) and image.format != "TIFF"  # which Pillow itself turns
        turn = Image.Transpose[TURNS[orientation - 2]] if lies else None
        size = image.size[::-1] if lies and orientation > 4 else image.size
        return Header(image, turn, size, pixels, num_crops, token_count(*grid(size, num_crops)))


@contextmanager
def _damage_told() -> Iterator[None]:
    try:
        yield
    except RequestError:
        raise
    except Image.DecompressionBombError:  # over twice what Pillow itself finds safe
        raise RequestError(f"the picture has far over {MAX_JPEG_PIXELS / 1e6:.0f} megapixels") from None
    except UnidentifiedImageError:
        raise RequestError(f"the picture is none of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders raise whatever the bytes lead them to; its words may leak addresses
        raise RequestError("the picture cannot be decoded: it is damaged or cut off") from error


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


def _open(source: bytes) -> Image.Image:
    if source[4:8] == b"ftyp":
        raise RequestError("HEIC and AVIF pictures are not read: send JPEG (an iPhone does with 'Most Compatible')")
    image = Image.open(io.BytesIO(source), formats=FORMATS)
    is_jpeg = image.format in ("JPEG", "MPO")  # MPO: a phone's JPEG with a second picture behind the first
    _check_size(*image.size, MAX_JPEG_PIXELS if is_jpeg else MAX_PIXELS)
    if is_jpeg:
        _check_scans(image, source.count(b"\xff\xda", image.fp.tell()) + 1)  # the header ends with the first of them
    if image.format == "TIFF" and image.info["compression"] not in COMPRESSIONS:
        raise RequestError(f"a TIFF's compression may be {', '.join(COMPRESSIONS)}, not {image.info['compression']}")
    if image.format == "PNG" and (behind := re.search(rb"eXIf(?=II\*\0|MM\0\*)", source)):
        image.info.setdefault("exif", source[behind.end() :])  # how it lies may be said behind the pixels
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16-bit grey: Pillow would clip it to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise RequestError("pictures with 32 bits a channel have no set white: save it with 8 or 16")
    if image.has_transparency_data:  # nothing is converted that need not be: each copy is 64 MB
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_size(width: int, height: int, most: int) -> None:
    if not (1 <= min(width, height) and max(width, height) <= MAX_SIDE):
        raise RequestError(f"a picture's sides may have 1 to {MAX_SIDE} pixels, not {width}×{height}")
    if width * height > most:
        raise RequestError(f"the picture has {width * height / 1e6:.0f} megapixels, at most {most / 1e6:.0f} may be")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise RequestError(f"a picture may be {MAX_ASPECT} times as long as wide, not {width}×{height}")


def _check_scans(image: Image.Image, scans: int) -> None:
    """A JPEG of several scans is kept whole, and each of them goes over all of it: both are limited by its samples."""
    across, down = (max(layer[k] for layer in image.layer) for k in (1, 2))
    samples = math.prod(image.size) * sum(layer[1] * layer[2] for layer in image.layer) / (across * down)
    if scans > 1 and max(scans, MAX_SCANS) * max(samples, MAX_SAMPLES / 4) > MAX_SCANS * MAX_SAMPLES:
        work = f"{scans} scans of {samples / 1e6:.0f} million samples"
        raise RequestError(f"the JPEG has {work}, too many: save it again without progressive mode")

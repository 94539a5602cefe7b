"""Picture bytes → crops: geometry, colours, orientation, and every limit."""

import io
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image, ImageDraw

from phi3v import images
from phi3v.errors import RequestError

PARITY = Path(__file__).parent / "parity"
GEOMETRY = dict(np.load(PARITY / "geometry.npz"))


def load(source) -> Image.Image:
    """What is cut into crops: upright, RGB."""
    with patch.object(images, "process", lambda image, num_crops: image):
        return images.Header(source, 4).crops()


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_all_sizes_get_the_grid_and_the_tokens_of_the_reference():
    columns = list(GEOMETRY["columns"])
    assert len(GEOMETRY["table"]) == 1095
    for row in GEOMETRY["table"]:
        case = dict(zip(columns, row.tolist(), strict=True))
        short, long = sorted((case["w"], case["h"]))
        width, height = images.hd_size(long, short, case["num_crops"])
        assert (width, height) == (case["resize_w"], case["resize_h"]), case
        grid = -(-height // 336), -(-width // 336)
        assert (grid if case["w"] >= case["h"] else grid[::-1]) == (case["grid_h"], case["grid_w"]), case
        assert images.token_count(case["grid_h"], case["grid_w"]) == case["tokens"], case


def test_sizes_of_which_nothing_would_be_left_are_refused():
    assert len(GEOMETRY["rejects"]) == 39
    for num_crops, width, height in GEOMETRY["rejects"].tolist():
        with pytest.raises(RequestError, match="too narrow"):
            images.hd_size(max(width, height), min(width, height), num_crops)


@pytest.mark.parametrize(
    "width, height, num_crops, grid", [(600, 400, 4, (2, 2)), (250, 701, 4, (2, 1)), (9, 9, 16, (4, 4))]
)
def test_a_picture_is_centred_on_white_in_the_right_tiles(width, height, num_crops, grid):
    crops = images.process(Image.new("RGB", (width, height), (255, 0, 0)), num_crops)
    assert crops.grid == grid
    rows, columns = grid
    tiles = crops.pixels[1:].reshape(rows, columns, 3, 336, 336).transpose(2, 0, 3, 1, 4).reshape(3, rows * 336, -1)
    picture = tiles * images.STD[:, None, None] + images.MEAN[:, None, None]
    red = np.abs(picture - np.array([1, 0, 0])[:, None, None]).max(0) < 1e-5
    white = np.abs(picture - 1).max(0) < 1e-5
    assert (red | white).all()
    inside = images.hd_size(max(width, height), min(width, height), num_crops)
    assert red.sum() == inside[0] * inside[1]
    y, x = np.nonzero(red)
    for low, high, side in ((y.min(), y.max(), rows * 336), (x.min(), x.max(), columns * 336)):
        assert 0 <= (side - 1 - high) - low <= 1  # an odd row of padding goes to the end


def test_one_crop_is_its_own_global_view():
    crops = images.process(Image.effect_noise((336, 336), 90).convert("RGB"), 1)
    assert np.array_equal(crops.pixels[0], crops.pixels[1])


def test_a_lying_phone_photo_is_turned_upright():
    image = Image.new("RGB", (40, 20), "blue")
    ImageDraw.Draw(image).rectangle((0, 0, 9, 19), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90° clockwise to view
    upright = load(encoded(image, "PNG", exif=exif))
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 2)) == (255, 0, 0)
    assert upright.getpixel((10, 30)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_are_laid_on_white(mode):
    image = Image.new("RGBA", (30, 30), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((10, 10, 20, 20), (0, 0, 0, 255))
    loaded = load(encoded(image.convert(mode), "PNG"))
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((15, 15)) == (0, 0, 0)


def test_sixteen_bit_grey_keeps_its_shades():
    values = np.array([[0, 32768], [49152, 65535]], np.uint16)
    loaded = load(encoded(Image.fromarray(values), "PNG"))
    assert [loaded.getpixel((x, y))[0] for y in (0, 1) for x in (0, 1)] == [0, 128, 192, 255]


@pytest.mark.parametrize("kind", images.FORMATS)
def test_every_format_is_read_from_bytes_path_and_object(kind, tmp_path):
    image = Image.new("RGB", (64, 48), (10, 200, 30))
    data = encoded(image, kind)
    path = tmp_path / "picture"
    path.write_bytes(data)
    for source in (data, path, str(path), Image.open(path)):
        loaded = load(source)
        assert loaded.mode == "RGB" and loaded.size == (64, 48)
        assert (
            np.abs(np.asarray(loaded, int) - [10, 200, 30]).max() <= 8
        )  # GIF has a palette, JPEG and WEBP lose a little
        if isinstance(source, Image.Image):
            source.close()


def test_only_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load(data).getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_huge_photo_is_scaled_down_while_it_is_decoded(kind):
    photo = Image.new("RGB", (6000, 4000), "green")
    second = {"save_all": True, "append_images": [Image.new("RGB", (90, 60))]} if kind == "MPO" else {}
    assert load(encoded(photo, kind, **second)).size == (3000, 2000)


def many_scans() -> bytes:
    """A small progressive JPEG that says its last scan again and again, each of which costs a whole decode."""
    data = encoded(Image.new("L", (400, 400), 200), "JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    return data[:-2] + data[last:-2] * 100 + b"\xff\xd9"


SMALL = encoded(Image.new("RGB", (50, 50), "red"), "PNG")
REFUSED = {
    "no picture": (b"hello", "none of PNG, JPEG"),
    "nothing": (b"", "none of PNG, JPEG"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "none of PNG, JPEG"),
    "an EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of PNG, JPEG"),
    "a HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0", "send JPEG"),
    "half a PNG": (SMALL[: len(SMALL) // 2], "damaged or cut off"),
    "a wrong checksum": (SMALL.replace(b"IDATx\x9c", b"IDATx\x9d"), "damaged or cut off"),
    "a strip": (encoded(Image.new("L", (1020, 20)), "PNG"), "50 times"),
    "a long side": (encoded(Image.new("1", (16385, 400)), "PNG"), "16384"),
    "a bomb": (encoded(Image.new("1", (13300, 13300)), "PNG"), "177 megapixels, at most 16"),
    "a bigger bomb": (encoded(Image.new("1", (16000, 16000)), "PNG"), "far over 64 megapixels"),
    "a JPEG of many scans": (many_scans(), "106 scans of 0 million samples, too many"),
    "a float TIFF": (encoded(Image.new("F", (9, 9), 0.5), "TIFF"), "32 bits a channel"),
    "a big PNG": (encoded(Image.new("1", (4001, 4000)), "PNG"), "16 megapixels, at most 16"),
    "a big JPEG": (encoded(Image.new("L", (8001, 8000)), "JPEG"), "64 megapixels, at most 64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_or_must_not_be_read_is_refused(name):
    data, message = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow's own; ours is the error
        with pytest.raises(RequestError, match=message) as caught:
            load(data)
    assert "0x" not in caught.value.message  # Pillow's words hold a heap address


def test_a_picture_is_not_decoded_before_its_size_is_known(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(RequestError, match="megapixels"):
        load(REFUSED["a big PNG"][0])


def test_other_types_are_a_programming_error():
    with pytest.raises(TypeError, match="not int"):
        load(7)

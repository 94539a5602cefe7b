"""Picture bytes → crops: geometry, colours, orientation, and every limit."""

import io
import os
import random
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image, ImageDraw

from phi3v import images
from phi3v.errors import RequestError

sys.path.insert(0, str(Path(__file__).parent.parent / "bench" / "guarantees"))
import pictures

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


SMALL = encoded(Image.new("RGB", (50, 50), "red"), "PNG")
LZW = encoded(Image.effect_noise((99, 99), 50), "TIFF", compression="tiff_lzw")
REFUSED = {
    "no picture": (b"hello", "none of PNG, JPEG"),
    "nothing": (b"", "none of PNG, JPEG"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "none of PNG, JPEG"),
    "an EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of PNG, JPEG"),
    "a HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC is not read here: send JPEG .`sips -s format jpeg IN"),
    "an AVIF": (b"\0\0\0\x20ftypmif1\0\0\0\0mif1avifmiaf", "AVIF is not read here: send JPEG"),
    "a video": (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(99), "the picture is none of PNG, JPEG"),
    "half a PNG": (SMALL[: len(SMALL) // 2], "damaged or cut off"),
    "a wrong checksum": (SMALL.replace(b"IDATx\x9c", b"IDATx\x9d"), "damaged or cut off"),
    "a strip": (encoded(Image.new("L", (1020, 20)), "PNG"), "50 times"),
    "a long side": (encoded(Image.new("1", (16385, 400)), "PNG"), "16384"),
    "a bomb": (encoded(Image.new("1", (13300, 13300)), "PNG"), "176,890,000 pixels, at most 16,000,000"),
    "a bigger bomb": (encoded(Image.new("1", (16000, 16000)), "PNG"), "far over 64 megapixels"),
    "a broken TIFF": (LZW[:20] + b"\xff" * 200 + LZW[220:], "damaged or cut off"),
    "a float TIFF": (encoded(Image.new("F", (9, 9), 0.5), "TIFF"), "32 bits a channel"),
    "a big PNG": (encoded(Image.new("1", (4001, 4000)), "PNG"), "16,004,000 pixels, at most 16,000,000"),
    "a big JPEG": (encoded(Image.new("L", (8001, 8000)), "JPEG"), "64,008,000 pixels, at most 64,000,000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_or_must_not_be_read_is_refused(name):
    data, message = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow's own; ours is the error
        with pytest.raises(RequestError, match=message) as caught:
            load(data)
    assert "0x" not in caught.value.message  # Pillow's words hold a heap address


SIPS = """#!/bin/sh
[ "$*" = "-s format jpeg $4 --out $6" ] && grep -q ftypheic "$4" || exit 9
echo "$4" >> {folder}/given
[ -e {folder}/made.jpg ] && cp {folder}/made.jpg "$6"
echo "a warning" >&2
"""


def test_a_heic_file_is_read_through_sips_on_a_mac_and_one_in_memory_is_not(tmp_path, monkeypatch):
    """With a program of that name that makes the picture `made.jpg`, or makes nothing."""
    heic, photo = REFUSED["a HEIC"][0], tmp_path / "-s a photo.HEIC"
    photo.write_bytes(heic)
    program = tmp_path / "sips"
    program.write_text(SIPS.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "made.jpg").write_bytes(encoded(Image.new("RGB", (64, 48), "red"), "JPEG"))
    with pytest.raises(RequestError, match="send JPEG"):
        load(photo)  # this system is no Mac
    monkeypatch.setattr(sys, "platform", "darwin")
    assert load(photo).size == load(str(photo)).size == (64, 48)
    given = (tmp_path / "given").read_text().splitlines()
    assert len(given) == 2 and not any(os.path.exists(name) for name in given)  # its files are gone
    with pytest.raises(RequestError, match="send JPEG"):
        load(heic)  # as it comes over the wire
    (tmp_path / "made.jpg").unlink()
    for _ in range(2):
        with pytest.raises(RequestError, match=r"^images: the program `sips` could not make a JPEG of it$"):
            load(photo)
        program.unlink(missing_ok=True)
    assert len((tmp_path / "given").read_text().splitlines()) == 3


def test_a_picture_is_not_decoded_before_its_size_is_known(monkeypatch):
    allowed = SMALL, encoded(Image.new("RGB", (6000, 4000)), "JPEG"), *pictures.originals()
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(RequestError, match="pixels, at most"):
        load(REFUSED["a big PNG"][0])
    for data in allowed:
        assert images.Header(data, 4).tokens > 0


def test_other_types_are_a_programming_error():
    with pytest.raises(TypeError, match="not int"):
        load(7)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "PIL"])
def test_the_header_tells_the_tokens_of_the_upright_picture(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = encoded(Image.new("RGB", (700, 300), "red"), "JPEG" if kind == "PIL" else kind, exif=exif)
    header = images.Header(Image.open(io.BytesIO(source)) if kind == "PIL" else source, 4)
    crops = header.crops()
    assert crops.grid == ((1, 2) if orientation < 5 else (2, 1))
    assert header.tokens == crops.tokens


@pytest.mark.parametrize("size", [(6000, 4001), (4001, 6000), (7999, 7999), (8000, 2050)])
def test_the_header_tells_the_tokens_of_a_photo_that_is_scaled_down(size):
    photo = encoded(Image.new("L", size), "JPEG")
    for num_crops in (1, 4, 9, 16):
        header = images.Header(photo, num_crops)
        assert header.pixels == size[0] * size[1]
        assert header.tokens == images.process(Image.new("RGB", header._image.size), num_crops).tokens
    assert header.crops().tokens == header.tokens


def test_a_png_may_say_behind_its_pixels_how_it_lies():
    exif = Image.Exif()
    exif[0x0112] = 6
    front = encoded(Image.new("RGB", (40, 20), "blue"), "PNG", exif=exif)
    at = front.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(front[at : at + 4], "big")
    behind = front[:at] + front[end:-12] + front[at:end] + front[-12:]
    assert behind.index(b"IDAT") < behind.index(b"eXIf")
    assert load(behind).size == load(front).size == (20, 40)


def test_a_picture_that_lies_in_two_ways_is_refused():
    said = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(Image.new("RGB", (40, 20)), "TIFF", tiffinfo={700: said})
    with pytest.raises(RequestError, match="says in two places how it lies"):
        load(data)


def test_what_a_picture_says_about_itself_is_dropped():
    exif = Image.Exif()
    exif[0x010E] = "who and where"
    digests = {
        images.Header(encoded(Image.new("RGB", (40, 20)), "JPEG", **more), 4).crops().digest
        for more in ({}, {"exif": exif}, {"comment": b"words"}, {"dpi": (9, 9)})
    }
    assert len(digests) == 1


BOMBS = {name: data for bombs in (pictures.over, pictures.crafted) for name, data in bombs()}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_one_line(name, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own; outside pytest they are ignored
        with pytest.raises(RequestError) as caught:
            images.Header(BOMBS[name], 16).crops()
    assert len(caught.value.message) < 200 and "\n" not in caught.value.message and caught.value.status == 400
    assert capfd.readouterr() == ("", "")


def test_mutated_files_are_read_or_refused_and_nothing_is_printed(capfd, monkeypatch):
    monkeypatch.setattr(images, "process", lambda image, num_crops: None)
    originals, answers, rng = pictures.originals(), [], random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not any(pictures.attempt(data) for data in originals)
        for data in originals * 20:
            answers.append(pictures.attempt(pictures.mutated(data, rng)))
    assert 100 < answers.count("") < len(answers) - 300
    assert all(len(answer) < 200 and "\n" not in answer for answer in answers)
    assert capfd.readouterr() == ("", "")

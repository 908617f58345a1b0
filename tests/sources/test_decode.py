"""An encoded image becomes upright 8-bit pixels of the channels and the size wanted."""

import io
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from pipeline.images import Images
from pipeline.params import InputError
from pipeline.sources import decode
from pipeline.sources.corrupt import Corrupt, CorruptImageError
from tests.sources.samples import encode, joined, pixels


def decoded(data: bytes, size: int | None = None, channels: int = 3) -> Images:
    return decode.decode("here", data, size=size, channels=channels)


def test_an_image_is_turned_upright_by_its_exif_orientation() -> None:
    image = pixels(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees anticlockwise
    every: tuple[dict[str, Any], ...] = ({}, {"format": "JPEG", "quality": 100, "subsampling": 0})
    for options in every:
        upright = decoded(encode(image, exif=exif, **options)).astype(int)
        plain = decoded(encode(image, **options)).astype(int)
        np.testing.assert_array_equal(upright, np.rot90(plain, -1))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF"])
def test_every_format_that_a_folder_may_hold_is_read(format: str) -> None:
    image = np.full((6, 5, 3), 255, np.uint8)
    np.testing.assert_allclose(decoded(encode(image, format=format)), image, atol=2)


@pytest.mark.parametrize("mode", ["RGBA", "P", "1", "L", "LA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_any_mode_gets_the_channels_wanted(mode: str, channels: int) -> None:
    grey = np.repeat(np.where(np.arange(30).reshape(6, 5, 1) % 2, 255, 0).astype(np.uint8), 3, axis=2)
    options = {"format": "TIFF"} if mode == "CMYK" else {}
    np.testing.assert_array_equal(decoded(encode(grey, mode, **options), channels=channels), grey[:, :, :channels])


def test_a_palette_with_transparency_decodes_without_a_warning() -> None:
    image = Image.fromarray(pixels(1)[0]).quantize(4)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes([0, 128, 255, 255]))
    np.testing.assert_array_equal(decoded(buffer.getvalue()), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("height", "width"), [(40, 80), (80, 40), (20, 20), (7, 9)])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_size_keeps_the_centre_of_the_image_and_its_proportions(format: str, height: int, width: int) -> None:
    rows, columns = np.mgrid[:height, :width] + 0.5
    short = min(height, width)
    radius = np.hypot(rows - height / 2, columns - width / 2) / short  # a disc of half the shorter side
    disc = np.repeat(np.where(radius < 0.25, 255, 0).astype(np.uint8)[:, :, None], 3, axis=2)
    got = decoded(encode(disc, format=format), size=10)
    assert got.shape == (10, 10, 3)
    share = got.mean() / 255
    assert share == pytest.approx(np.pi * 0.25**2, abs=0.06)
    np.testing.assert_allclose(got.astype(int), got[::-1].astype(int), atol=60)
    np.testing.assert_allclose(got.astype(int), got[:, ::-1].astype(int), atol=60)


def test_a_large_jpeg_decoded_at_reduced_scale_is_close_to_the_full_decoding() -> None:
    ramp = np.add.outer(np.linspace(0, 120, 600), np.linspace(0, 120, 800)).astype(np.uint8)
    image = np.repeat(ramp[:, :, None], 3, axis=2)
    reduced, full = (decoded(encode(image, format=format), size=32) for format in ("JPEG", "PNG"))
    assert np.abs(reduced.astype(int) - full).max() <= 3


@pytest.mark.parametrize(("height", "width"), [(40, 61), (61, 40), (7, 9), (33, 32), (100, 1000)])
def test_resizing_and_cropping_are_those_of_torchvision(height: int, width: int) -> None:
    image = pixels(1, height, width)[0]
    wanted = v2.CenterCrop(16)(v2.Resize(16, v2.InterpolationMode.BICUBIC)(Image.fromarray(image)))
    np.testing.assert_array_equal(decoded(encode(image), size=16), np.asarray(wanted))


def header_of_png(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels and holds none."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"]
    packed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


BAD = {
    "a bomb that PIL warns of": (header_of_png(10_000, 10_000), "decompression bomb"),
    "a bomb that PIL refuses": (header_of_png(60_000, 60_000), "decompression bomb"),
    "text": (b"no image at all", "not a readable image (of no known format)"),
    "nothing": (b"", "not a readable image (of no known format)"),
    "an EPS": (encode(pixels(1)[0], format="EPS"), "not a readable image (of no known format)"),
    "a PCX": (encode(pixels(1)[0], format="PCX"), "not a readable image (of no known format)"),
    "null": (None, "wanted an encoded image, got null"),
    "cut short": (encode(pixels(1, 40, 40)[0])[:-500], "not a readable image"),
    "16 bits": (encode(np.zeros((3, 3), np.uint16)), "wanted 8 bits per channel, got an image of mode I;16"),
    "a thin strip": (encode(np.zeros((1, 500), np.uint8)), "wanted sides in a proportion of at most 100, got 500 x 1"),
}


@pytest.mark.parametrize(("data", "reason"), BAD.values(), ids=BAD.keys())
def test_what_is_no_image_says_why_and_names_no_address(data: bytes | None, reason: str) -> None:
    with pytest.raises(CorruptImageError) as error:
        decode.decode("here", data, size=8, channels=3)
    assert error.value.where == "here"
    assert reason in error.value.reason
    assert " at 0x" not in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # it comes from another process


@pytest.mark.parametrize("change", ["size", "time", "gone"])
def test_a_file_that_is_not_as_it_was_listed_is_an_error_and_no_corrupt_image(tmp_path: Path, change: str) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encode(pixels(1)[0]))
    before = file.stat()
    listed = decode.Loose(file, before.st_size, before.st_mtime_ns)
    np.testing.assert_array_equal(decode.decode("here", listed, size=None, channels=3), pixels(1)[0])
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes(encode(pixels(1)[0]) + b"x" * (change == "size"))
        os.utime(file, ns=(0, before.st_mtime_ns + (change == "time")))
    with pytest.raises(InputError, match=r"a\.png: has changed while it was read; wait until it is complete") as error:
        decode.decode("here", listed, size=None, channels=3)
    assert not isinstance(error.value, CorruptImageError)


def batches_with_holes(count: int, bad: set[int]) -> list[list[decode.Encoded]]:
    images = pixels(count)
    encoded: list[decode.Encoded] = [(f"image {row}", b"" if row in bad else encode(images[row])) for row in range(count)]
    return [encoded[:7], encoded[7:]]


def test_corrupt_images_are_left_out_counted_and_listed_by_their_source_row() -> None:
    corrupt, rows, labels = Corrupt(limit=2), np.arange(10) * 3, np.arange(30)
    chunks = decode.decode_all(batches_with_holes(10, {0, 8}), labels, rows, corrupt, shape=(6, 5, 3), size=None)
    images, got = joined(chunks)
    good = [1, 2, 3, 4, 5, 6, 7, 9]
    np.testing.assert_array_equal(images, pixels(10)[good])
    assert got.tolist() == (rows[good]).tolist()
    assert [(entry["source_row"], entry["image"]) for entry in corrupt.listed()] == [(0, "image 0"), (24, "image 8")]


def test_one_corrupt_image_more_than_the_limit_is_an_error_that_names_it() -> None:
    chunks = decode.decode_all(
        batches_with_holes(10, {0, 8}), np.arange(10), np.arange(10), Corrupt(limit=1), shape=(6, 5, 3), size=None
    )
    with pytest.raises(InputError, match=r"image 8: not a readable image .* and 1 more before it; .* max_corrupt \(now 1\)"):
        list(chunks)


def test_the_shape_is_that_of_the_first_image_that_can_be_read() -> None:
    assert decode.first_shape([("a", b""), ("b", encode(pixels(1)[0]))], 1) == (6, 5, 1)
    with pytest.raises(CorruptImageError, match="a: not a readable image"):
        decode.first_shape([("a", b"")], 3)

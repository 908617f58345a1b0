"""An encoded image becomes upright 8-bit pixels of the channels and the size wanted."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.images import Images
from pipeline.sources import decode
from tests.sources.samples import encode, pixels


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


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (20, 20), (7, 9)])
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

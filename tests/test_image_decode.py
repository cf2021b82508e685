"""Every kind of image file becomes upright 8-bit pixels, or a reason why not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from image_parts.decode import (
    UnreadableImage,
    as_rgb,
    decode_image,
    measure_value_range,
    read_content,
    read_header,
    read_image,
)
from tests.image_files import encode, encode_deep, orientation_exif, picture


def mean_difference(left: np.ndarray, right: np.ndarray) -> float:
    assert left.shape == right.shape
    return float(np.abs(left.astype(int) - right.astype(int)).mean())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_give_the_pixels_back(kind):
    pixels = picture()
    assert np.array_equal(decode_image(encode(pixels, kind)), pixels)
    grey = pixels[:, :, 1]
    assert np.array_equal(decode_image(encode(grey, kind)), grey)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95}), ("AVIF", {})])
def test_lossy_formats_keep_the_colours_in_order(kind, options):
    pixels = picture()
    decoded = decode_image(encode(pixels, kind, **options))
    assert mean_difference(decoded, pixels) < 4
    assert mean_difference(decoded[..., ::-1], pixels) > 20  # swapped red and blue would be far off


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(kind, orientation):
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    content = encode(picture(), kind, exif=orientation_exif(orientation), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    assert mean_difference(decode_image(content), expected) < 2
    header = read_header(content)
    assert (header.height, header.width) == expected.shape[:2]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_images_are_turned_too(kind, orientation):
    values = np.arange(6 * 4, dtype=np.uint16).reshape(6, 4) * 100
    content = encode(values, kind, exif=orientation_exif(orientation))
    turns = {1: values, 3: values[::-1, ::-1], 6: np.rot90(values, -1), 8: np.rot90(values, 1)}
    decoded = decode_image(content, value_range=(0, 2550))
    assert np.array_equal(decoded, np.rint(turns[orientation] / 10).astype(np.uint8))
    header = read_header(content)
    assert (header.height, header.width) == decoded.shape


def test_sixteen_bit_images_use_the_range_of_the_data_set():
    values = np.array([[0, 1000], [2000, 4000]], np.uint16)
    for content in (encode_deep(values, ".png"), encode_deep(values, ".tiff")):
        assert read_header(content).is_deep
        assert measure_value_range(content) == (0, 4000)
        assert decode_image(content, value_range=(0, 8000)).tolist() == [[0, 32], [64, 128]]
        # Alone, an image spans its own range; Pillow's conversion would have clipped all of these to white.
        assert decode_image(content).tolist() == [[0, 64], [128, 255]]


def test_sixteen_bit_colour_keeps_its_order_and_depth():
    values = picture().astype(np.uint16) * 16  # 12 bits in 16: read as 8 bits it would be near black
    for extension in (".png", ".tiff"):
        content = encode_deep(values, extension)
        header = read_header(content)
        assert header.is_deep
        assert mean_difference(decode_image(content, value_range=(0, 4080)), picture()) < 1


def test_float_and_signed_images_with_nan():
    values = np.array([[0.0, 0.5], [1.0, np.nan]], np.float32)
    content = encode_deep(values, ".tiff")
    assert measure_value_range(content) == (0, 1)
    assert decode_image(content).tolist() == [[0, 128], [255, 0]]
    signed = np.array([[-100, 0], [100, 155]], np.int32)
    assert decode_image(encode_deep(signed, ".tiff"), value_range=(-100, 155)).tolist() == [[0, 100], [200, 255]]


def test_constant_deep_image_is_black_and_not_an_error():
    content = encode_deep(np.full((3, 3), 700, np.uint16), ".png")
    assert decode_image(content, value_range=measure_value_range(content)).max() == 0


def test_transparency_is_white_and_hides_what_is_below():
    pixels = np.dstack([picture(), np.full((48, 64), 255, np.uint8)])
    pixels[:10, :, 3] = 0
    pixels[10:20, :, 3] = 51  # a fifth
    for kind in ("PNG", "TIFF"):
        decoded = decode_image(encode(pixels, kind))
        assert (decoded[:10] == 255).all()
        expected = np.rint(pixels[10:20, :, :3] * 0.2 + 255 * 0.8)
        assert np.abs(decoded[10:20] - expected).max() <= 1
        assert np.array_equal(decoded[20:], pixels[20:, :, :3])


def test_sixteen_bit_transparency():
    values = np.full((4, 4, 4), 1000, np.uint16)
    values[:2, :, 3] = 0
    values[2:, :, 3] = 65535
    decoded = decode_image(encode_deep(values, ".png"), value_range=(0, 2000))
    assert decoded[:2].tolist() == [[[255] * 3] * 4] * 2
    assert decoded[2:].tolist() == [[[128] * 3] * 4] * 2


def test_palette_with_and_without_transparency():
    image = Image.fromarray(picture()).quantize(16)
    plain, transparent = io.BytesIO(), io.BytesIO()
    image.save(plain, "PNG")
    index = int(np.asarray(image)[0, 0])
    image.save(transparent, "PNG", transparency=index)
    assert mean_difference(decode_image(plain.getvalue()), np.asarray(image.convert("RGB"))) == 0
    assert decode_image(transparent.getvalue())[0, 0].tolist() == [255, 255, 255]


def test_cmyk_and_bilevel_and_gif():
    cmyk = io.BytesIO()
    Image.fromarray(picture()).convert("CMYK").save(cmyk, "JPEG", quality=95)
    assert mean_difference(decode_image(cmyk.getvalue()), picture()) < 6
    bits = io.BytesIO()
    Image.fromarray(picture()[:, :, 0]).convert("1").save(bits, "PNG")
    assert set(np.unique(decode_image(bits.getvalue()))) <= {0, 255}
    gif = io.BytesIO()
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (10, 200)]
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    assert int(decode_image(gif.getvalue()).max()) == 10  # the first picture of an animation


def test_wrong_extension_does_not_matter(tmp_path):
    path = tmp_path / "really_a.jpg"
    path.write_bytes(encode(picture(), "PNG"))
    assert np.array_equal(read_image(path), picture())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "GIF", "WEBP"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_truncated_images_are_refused_never_half_shown(kind, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encode(noise, kind)
    with pytest.raises(UnreadableImage) as refused:
        decode_image(content[: int(len(content) * kept)])
    assert str(refused.value)


def test_truncated_sixteen_bit_is_refused():
    content = encode_deep(np.random.default_rng(0).integers(0, 4000, (64, 64)).astype(np.uint16), ".png")
    with pytest.raises(UnreadableImage):
        decode_image(content[: len(content) // 2])


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"hello, I am a text", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused_with_a_reason(content, tmp_path):
    with pytest.raises(UnreadableImage):
        decode_image(content)
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match="empty" if not content else "."):
        read_image(path)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(UnreadableImage, match="No such file"):
        read_content(tmp_path / "absent.png")
    with pytest.raises(UnreadableImage, match="directory"):
        read_content(tmp_path)


def test_large_jpegs_are_decoded_small_but_never_below_the_wish():
    content = encode(picture(480, 640), "JPEG", quality=95)
    assert decode_image(content).shape == (480, 640, 3)
    assert decode_image(content, at_least=(100, 100)).shape == (120, 160, 3)
    assert decode_image(content, at_least=(200, 200)).shape == (240, 320, 3)
    assert decode_image(content, at_least=(600, 100)).shape == (480, 640, 3)
    small, full = decode_image(content, at_least=(160, 120)), decode_image(content)
    block_means = full.reshape(120, 4, 160, 4, 3).mean(axis=(1, 3))
    assert mean_difference(small, np.rint(block_means).astype(np.uint8)) < 2


def test_turned_jpegs_are_decoded_small_upright():
    content = encode(picture(480, 640), "JPEG", exif=orientation_exif(6))
    assert decode_image(content, at_least=(100, 150)).shape == (160, 120, 3)


def test_grey_as_rgb():
    grey = picture()[:, :, 0]
    assert as_rgb(grey).shape == (48, 64, 3)
    assert as_rgb(picture()) is not None

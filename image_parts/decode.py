"""One decoder for all images: bytes in, upright 8-bit pixels out, or the reason why not.

EXIF and TIFF orientation, alpha (over white), CMYK, palettes, 16-bit and float images, WebP, AVIF, truncated and empty
files, and files whose extension lies are all handled here and nowhere else. Half an image is never passed on.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_BACKGROUND = 255  # transparent pixels show this grey: white, as paper and web pages do
_MAX_PIXELS = 2**28
_EXIF_ORIENTATION = 274
_TIFF_BITS_PER_SAMPLE = 258
_PNG_DEPTH_BYTE = 24  # of the IHDR chunk, which is always the first
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class UnreadableImage(Exception):
    """A file that is no whole image; the message is the reason, for bad_images.csv."""


@dataclass(frozen=True)
class ImageHeader:
    """What the first bytes of a file tell, before its pixels are decoded."""

    width: int  # upright, that is after the rotation that the file asks for
    height: int
    format: str  # as Pillow names it: JPEG, PNG, TIFF, …; "" for formats that OpenCV alone reads
    mode: str
    orientation: int  # EXIF, 1 … 8
    is_deep: bool  # more than 8 bits a channel


def decode_image(
    content: bytes, *, value_range: tuple[float, float] | None = None, at_least: tuple[int, int] | None = None
) -> np.ndarray:
    """Decode an image file into upright RGB or grey pixels: [h, w, 3] or [h, w] uint8.

    `value_range` is what becomes 0 and 255 in images of more than 8 bits; None takes the range of this image alone.
    `at_least` (width, height) lets large JPEGs be decoded at 1/2, 1/4 or 1/8 of their size, as long as they stay that
    large; it saves most of the time where a thumbnail or a network input is wanted.

    Raises UnreadableImage with the reason.
    """
    header = read_header(content)
    if header.is_deep or not header.format:
        return _to_eight_bits(_decode_deep(content, header), value_range)
    if header.format in ("JPEG", "MPO") and header.mode in ("RGB", "L"):
        return _decode_jpeg(content, header, at_least)
    return _decode_pillow(content)


def read_image(
    path: Path, *, value_range: tuple[float, float] | None = None, at_least: int | None = None
) -> np.ndarray:
    """Decode the image at `path` into upright RGB pixels: [h, w, 3] uint8; both sides stay above `at_least` if given.

    Raises UnreadableImage with the reason.
    """
    size = (at_least, at_least) if at_least else None
    return as_rgb(decode_image(read_content(path), value_range=value_range, at_least=size))


def read_content(path: Path) -> bytes:
    """The bytes of a file; raises UnreadableImage where the system refuses or the file is empty."""
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise UnreadableImage(f"cannot be read: {os.strerror(problem.errno or 0)}") from None
    if not content:
        raise UnreadableImage("the file is empty")
    return content


def read_header(content: bytes) -> ImageHeader:
    """Size, format and depth of an image file, without decoding its pixels; raises UnreadableImage."""
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise UnreadableImage("the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _header_of(image, content)
    except UnidentifiedImageError:
        return _header_by_opencv(content)
    except Image.DecompressionBombError as problem:
        raise UnreadableImage(f"too large: {problem}") from None
    except (OSError, ValueError, SyntaxError, KeyError, EOFError, TypeError) as problem:  # what broken headers raise
        raise UnreadableImage(f"damaged header ({_brief(problem)})") from None


def measure_value_range(content: bytes) -> tuple[float, float]:
    """Least and largest finite value in an image of more than 8 bits; raises UnreadableImage."""
    values = _decode_deep(content, read_header(content))
    values = values[..., :3] if values.ndim == 3 else values
    finite = values if values.dtype.kind != "f" else values[np.isfinite(values)]
    if not finite.size:
        raise UnreadableImage("holds no finite number")
    return float(finite.min()), float(finite.max())


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Grey [h, w] or RGB [h, w, 3] pixels as RGB."""
    return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)


def _header_of(image: Image, content: bytes) -> ImageHeader:
    width, height = image.size
    if width * height > _MAX_PIXELS:
        raise UnreadableImage(f"too large: {width} x {height} pixels")
    try:
        orientation = int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF, which Pillow reports by many types, says nothing about the pixels
        orientation = 1
    # Pillow turns TIFF images by itself and gives their upright size at once.
    if orientation in (5, 6, 7, 8) and image.format != "TIFF":
        width, height = height, width
    is_deep = image.mode in _DEEP_MODES or _bits_per_channel(image, content) > 8
    return ImageHeader(width, height, image.format or "", image.mode, orientation, is_deep)


def _bits_per_channel(image: Image, content: bytes) -> int:
    """Bits in the file: Pillow opens 16-bit RGB as if it had 8."""
    if image.format == "PNG":
        return content[_PNG_DEPTH_BYTE] if len(content) > _PNG_DEPTH_BYTE else 8
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS_PER_SAMPLE, 8)
        return max(bits) if isinstance(bits, tuple) else int(bits)
    return 8


def _header_by_opencv(content: bytes) -> ImageHeader:
    """Formats that Pillow does not know (EXR, HDR, …) are decoded to be measured: they are rare."""
    pixels = _imdecode(content, unchanged=True)
    if pixels is None:
        raise UnreadableImage(f"not an image that can be read (begins with {content[:12]!r})")
    return ImageHeader(pixels.shape[1], pixels.shape[0], "", "", 1, pixels.dtype != np.uint8)


def _imdecode(content: bytes, *, unchanged: bool = False, reduction: int = 1) -> np.ndarray | None:
    """OpenCV's decoder; None for what it cannot read. RGB order, upright unless `unchanged`."""
    import cv2

    flags = {
        1: cv2.IMREAD_COLOR,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }
    buffer = np.frombuffer(content, np.uint8)
    try:
        pixels = cv2.imdecode(buffer, cv2.IMREAD_UNCHANGED if unchanged else flags[reduction])
    except cv2.error:
        return None
    if pixels is None or pixels.ndim == 2:
        return pixels
    order = cv2.COLOR_BGRA2RGBA if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGB
    return cv2.cvtColor(pixels, order) if pixels.dtype in (np.uint8, np.uint16, np.float32) else pixels[..., ::-1]


def _decode_jpeg(content: bytes, header: ImageHeader, at_least: tuple[int, int] | None) -> np.ndarray:
    """OpenCV reads JPEGs several times faster than Pillow, turns them by EXIF, and refuses truncated ones."""
    reduction = _reduction(header, at_least) if at_least else 1
    pixels = _imdecode(content, reduction=reduction)
    if pixels is None:
        raise UnreadableImage("damaged or truncated JPEG")
    return pixels[:, :, 0].copy() if header.mode == "L" else pixels


def _reduction(header: ImageHeader, at_least: tuple[int, int]) -> int:
    factors = [n for n in (8, 4, 2) if header.width // n >= at_least[0] and header.height // n >= at_least[1]]
    return factors[0] if factors else 1


def _decode_pillow(content: bytes) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = image.convert("RGBA")
            pixels = np.asarray(image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError) as problem:
        raise UnreadableImage(f"damaged or truncated ({_brief(problem)})") from None
    return _over_background(pixels) if pixels.shape[-1] == 4 and pixels.ndim == 3 else pixels


def _over_background(pixels: np.ndarray) -> np.ndarray:
    """RGBA pixels [h, w, 4] uint8, composed over the background: [h, w, 3] uint8."""
    alpha = pixels[..., 3:].astype(np.float32) / 255
    return np.rint(pixels[..., :3] * alpha + _BACKGROUND * (1 - alpha)).astype(np.uint8)


def _decode_deep(content: bytes, header: ImageHeader) -> np.ndarray:
    """Pixels as stored, upright: [h, w] or [h, w, c] of any number type, channels in RGB(A) order."""
    from PIL import Image

    if header.mode in _DEEP_MODES:
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                values = np.asarray(image)
        except (OSError, ValueError, SyntaxError, EOFError) as problem:
            raise UnreadableImage(f"damaged or truncated ({_brief(problem)})") from None
        # Pillow has turned a TIFF already; OpenCV leaves all turning of unchanged pixels to us.
        return values if header.format == "TIFF" else _upright(values, header.orientation)
    pixels = _imdecode(content, unchanged=True)
    if pixels is None:
        raise UnreadableImage("damaged or truncated")
    return _upright(pixels, header.orientation)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation: 2 mirrored, 3 upside down, 4 flipped, 5 to 8 lying."""
    if orientation in (5, 6, 7, 8):
        pixels = np.swapaxes(pixels, 0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _to_eight_bits(values: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """Map a range of values to 0 … 255; what is outside, as alpha or NaN, does not disturb the rest."""
    if values.dtype == np.uint8:
        return _over_background(values) if values.ndim == 3 and values.shape[2] == 4 else values
    colors, alpha = (values[..., :3], values[..., 3:]) if values.ndim == 3 else (values, None)
    if value_range is None:
        finite = colors[np.isfinite(colors)]
        value_range = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low, high = value_range
    scaled = (colors.astype(np.float64) - low) * (255 / (high - low) if high > low else 0.0)
    eight = np.rint(np.clip(np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0), 0, 255)).astype(np.uint8)
    if alpha is None or alpha.shape[2] == 0:
        return eight
    full = np.iinfo(alpha.dtype).max if alpha.dtype.kind in "iu" else 1.0
    return _over_background(np.concatenate([eight, np.rint(alpha / full * 255).astype(np.uint8)], axis=2))


def _brief(problem: BaseException) -> str:
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text[:150]

"""From decoded pixels to the squares that the network sees, in one or two polarities.

Both polarities go through one and the same function, f(I) and f(255 - I), negated before anything is rounded. So an
image and its negative give the same two squares in another order, bit for bit, and the same mean vector.
"""

from __future__ import annotations

import numpy as np

from image_parts.settings import PreprocessingSettings

# Letterbox bars: 255 * 0.449, the mean of ImageNet, which a network sees as zero.
_BAR = 114


def prepare_image(pixels: np.ndarray, settings: PreprocessingSettings, *, image_size: int) -> np.ndarray:
    """Trim, resize and equalise an image: [p, s, s, c] uint8 with p = 2 polarities (1 if not asked for), c = 1 or 3.

    `pixels` is grey [h, w] or RGB [h, w, 3] uint8. Plane 0 is the image as it is, plane 1 its negative.
    """
    trimmed = _trim(pixels, settings)
    planes = [_prepare_plane(trimmed, settings, image_size)]
    if settings.polarity_invariant:
        planes.append(_prepare_plane(255 - trimmed, settings, image_size))
    return np.stack(planes)


def needed_size(settings: PreprocessingSettings, *, image_size: int) -> tuple[int, int]:
    """Width and height below which decoding at a reduced size would cost sharpness."""
    kept_width = 1 - settings.trim_left - settings.trim_right
    kept_height = 1 - settings.trim_top - settings.trim_bottom
    return int(np.ceil(image_size / kept_width)), int(np.ceil(image_size / kept_height))


def equalize(lightness: np.ndarray, settings: PreprocessingSettings) -> np.ndarray:
    """Spread the contrast of grey pixels [h, w] uint8 as the settings say."""
    import cv2

    if settings.effective_equalization == "he":
        return cv2.equalizeHist(lightness)
    if settings.effective_equalization == "clahe":
        grid = settings.clahe_grid_size
        return cv2.createCLAHE(settings.clahe_clip_limit, (grid, grid)).apply(lightness)
    return lightness


def _prepare_plane(pixels: np.ndarray, settings: PreprocessingSettings, image_size: int) -> np.ndarray:
    """One polarity: [s, s, c] uint8."""
    import cv2

    if pixels.ndim == 3 and settings.grayscale:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    resized = _resize(pixels, settings, image_size)
    if settings.effective_equalization != "none":
        resized = _equalize_any(resized, settings)
    square = _letterbox(resized, image_size) if settings.resize == "letterbox" else resized
    return square[:, :, None] if square.ndim == 2 else square


def _trim(pixels: np.ndarray, settings: PreprocessingSettings) -> np.ndarray:
    height, width = pixels.shape[:2]
    top, left = int(height * settings.trim_top), int(width * settings.trim_left)
    bottom, right = height - int(height * settings.trim_bottom), width - int(width * settings.trim_right)
    return pixels[top:bottom, left:right]


def _resize(pixels: np.ndarray, settings: PreprocessingSettings, image_size: int) -> np.ndarray:
    import cv2

    if settings.resize == "crop":
        pixels = _center_crop(pixels)
    height, width = pixels.shape[:2]
    target = (image_size, image_size)
    if settings.resize == "letterbox":
        scale = image_size / max(height, width)
        target = (max(1, round(width * scale)), max(1, round(height * scale)))
    shrinks = target[0] < width or target[1] < height
    # Only INTER_AREA filters before it drops pixels.
    return cv2.resize(pixels, target, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _center_crop(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def _equalize_any(pixels: np.ndarray, settings: PreprocessingSettings) -> np.ndarray:
    """Equalise grey pixels, or the lightness of coloured ones."""
    import cv2

    if pixels.ndim == 2:
        return equalize(pixels, settings)
    lab = cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)
    lab[:, :, 0] = equalize(np.ascontiguousarray(lab[:, :, 0]), settings)
    return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)


def _letterbox(pixels: np.ndarray, image_size: int) -> np.ndarray:
    import cv2

    height, width = pixels.shape[:2]
    top, left = (image_size - height) // 2, (image_size - width) // 2
    bottom, right = image_size - height - top, image_size - width - left
    return cv2.copyMakeBorder(pixels, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(_BAR, _BAR, _BAR))

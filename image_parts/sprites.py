"""Thumbnails of many images, and sheets of them: one JPEG for hundreds, so that a page with thousands stays small."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from common.cli import Progress
from image_parts.decode import UnreadableImage, read_image
from image_parts.records import ImageRecord

log = logging.getLogger(__name__)

PAPER = 244  # the grey around thumbnails that are no squares
_MACROBLOCK = 16  # pixels that JPEG codes together: cells of a multiple of it do not bleed into each other
_SHEET_SIDE = 2048  # pixels; larger ones are refused by the graphics memory of some phones
_N_SAMPLED = 250  # thumbnails that are encoded to choose a quality
_QUALITIES = (86, 80, 72, 62, 50, 38, 26)


@dataclass(frozen=True)
class SpriteSheets:
    """Thumbnails side by side, row after row, in as many sheets as it takes."""

    sheets: list[bytes]  # JPEG
    cell: int  # pixels from one thumbnail to the next
    size: int  # pixels of a thumbnail, in the corner of its cell
    n_columns: int
    n_per_sheet: int

    @property
    def n_bytes(self) -> int:
        """Bytes of all sheets together."""
        return sum(len(sheet) for sheet in self.sheets)


def load_thumbnails(
    records: Sequence[ImageRecord],
    *,
    size: int,
    value_range: tuple[float, float] | None = None,
    n_workers: int = 1,
    progress: bool = False,
) -> np.ndarray:
    """Decode and shrink images: [n, size, size, 3] uint8 RGB, the longer side `size`, in the middle of a grey square.

    An image that can no longer be read is an empty square with a cross; their number is logged.
    """
    thumbnails = np.empty((len(records), size, size, 3), np.uint8)
    found = each_thumbnail(records, size=size, value_range=value_range, n_workers=n_workers, progress=progress)
    for row, thumbnail in enumerate(found):
        thumbnails[row] = thumbnail
    return thumbnails


def square_sprite(thumbnails: Iterable[np.ndarray], *, count: int, size: int) -> np.ndarray:
    """Lay `count` thumbnails [size, size, 3] out in one square as they come, row first: [m, m, 3] uint8 RGB.

    As the TensorBoard projector wants them; none is kept beside the square.
    """
    n_columns = math.ceil(math.sqrt(count))
    sprite = np.full((n_columns * size, n_columns * size, 3), PAPER, np.uint8)
    cells = sprite.reshape(n_columns, size, n_columns, size, 3).swapaxes(1, 2)  # [row, column, size, size, 3]
    for i, thumbnail in enumerate(thumbnails):
        cells[divmod(i, n_columns)] = thumbnail
    return sprite


def each_thumbnail(
    records: Sequence[ImageRecord],
    *,
    size: int,
    value_range: tuple[float, float] | None = None,
    n_workers: int = 1,
    progress: bool = False,
) -> Iterator[np.ndarray]:
    """Yield the thumbnail of each record, [size, size, 3] uint8, decoded ahead; see `load_thumbnails`."""
    n_lost = 0

    def load(record: ImageRecord) -> np.ndarray | None:
        try:
            return fit_square(read_image(record.path, value_range=value_range, at_least=size), size=size)
        except UnreadableImage as problem:
            log.debug("no thumbnail of %s: %s", record.shown_path, problem)
            return None

    with (
        ThreadPoolExecutor(max(1, n_workers)) as pool,
        Progress(len(records), label="thumbnails", unit="images", enabled=progress) as shown,
    ):
        for thumbnail in pool.map(load, records):
            n_lost += thumbnail is None
            yield _crossed_square(size) if thumbnail is None else thumbnail
            shown.update(1)
    if n_lost:
        log.warning("%d of %d images could not be read for their thumbnails", n_lost, len(records))


def fit_square(pixels: np.ndarray, *, size: int) -> np.ndarray:
    """Shrink or enlarge RGB pixels [h, w, 3] until the longer side is `size`: [size, size, 3], centred on grey."""
    import cv2

    height, width = pixels.shape[:2]
    scale = size / max(height, width)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST if scale >= 2 else cv2.INTER_CUBIC
    square = np.full((size, size, 3), PAPER, np.uint8)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    square[top : top + new_height, left : left + new_width] = cv2.resize(
        pixels, (new_width, new_height), interpolation=method
    )
    return square


def pack_sprites(thumbnails: np.ndarray, *, max_bytes: int) -> SpriteSheets:
    """Pack thumbnails [n, s, s, 3] into JPEG sheets of at most `max_bytes` together.

    The quality is lowered until they fit, then the thumbnails are halved, so that the limit holds for noise too.
    """
    size = thumbnails.shape[1]
    while True:
        for quality in _QUALITIES:
            if _estimate_bytes(thumbnails, quality=quality) > max_bytes:
                continue
            packed = _pack(thumbnails, quality=quality)
            if packed.n_bytes <= max_bytes:
                return packed
        if size <= _MACROBLOCK:
            return _pack(thumbnails, quality=_QUALITIES[-1])
        size = max(_MACROBLOCK, size // 2)
        thumbnails = np.stack([fit_square(thumbnail, size=size) for thumbnail in thumbnails])
        log.info("thumbnails are shrunk to %d pixels to keep the page small", size)


def _estimate_bytes(thumbnails: np.ndarray, *, quality: int) -> float:
    """Bytes of all sheets, from those of a sample."""
    step = max(1, len(thumbnails) // _N_SAMPLED)
    sample = thumbnails[::step]
    return _pack(sample, quality=quality).n_bytes / max(1, len(sample)) * len(thumbnails)


def _pack(thumbnails: np.ndarray, *, quality: int) -> SpriteSheets:
    size = thumbnails.shape[1]
    cell = math.ceil(size / _MACROBLOCK) * _MACROBLOCK
    n_columns = _SHEET_SIDE // cell
    n_per_sheet = n_columns * n_columns
    sheets = []
    for start in range(0, len(thumbnails), n_per_sheet):
        part = thumbnails[start : start + n_per_sheet]
        n_rows = math.ceil(len(part) / n_columns)
        sheets.append(_encode_jpeg(_lay_out(part, n_columns=n_columns, n_rows=n_rows, cell=cell), quality=quality))
    return SpriteSheets(sheets, cell, size, n_columns, n_per_sheet)


def _lay_out(thumbnails: np.ndarray, *, n_columns: int, n_rows: int, cell: int) -> np.ndarray:
    size = thumbnails.shape[1]
    sheet = np.full((n_rows * cell, n_columns * cell, 3), PAPER, np.uint8)
    for i, thumbnail in enumerate(thumbnails):
        top, left = i // n_columns * cell, i % n_columns * cell
        sheet[top : top + size, left : left + size] = thumbnail
    return sheet


def _encode_jpeg(pixels: np.ndarray, *, quality: int) -> bytes:
    import cv2

    flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    done, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), flags)
    if not done:
        raise RuntimeError("OpenCV could not encode a JPEG")
    return encoded.tobytes()


def _crossed_square(size: int) -> np.ndarray:
    square = np.full((size, size, 3), PAPER, np.uint8)
    steps = np.arange(size // 4, size - size // 4)
    square[steps, steps] = square[steps, size - 1 - steps] = 180
    return square

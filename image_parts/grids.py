"""Pictures of clusters and of the preprocessing as PNG sheets with captions."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.commit import write_bytes
from common.figures import LINE, QUIET, TEXT
from image_parts.decode import as_rgb
from image_parts.records import NOISE, ClusteredImages, cluster_name
from image_parts.scatter_html import cluster_color
from image_parts.sprites import fit_square

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

    from image_parts.records import ImageRecord

MAX_CLUSTERS = 60  # rows of the grid; the largest clusters come first
_GAP = 6
_EDGE = 28  # around the whole sheet
_HEAD = 74  # the title and the line below it
_CAPTION = 168  # left of each row


def choose_samples(clustered: ClusteredImages, label: int, *, n_samples: int) -> np.ndarray:
    """Choose rows of a cluster evenly from the most typical to the farthest from its centroid: [m], m <= n_samples.

    So the left of a row shows what the cluster is, and its right whether it is clean.
    """
    rows = clustered.members(label)
    order = np.argsort(np.nan_to_num(clustered.distances[rows], nan=0.0), kind="stable")
    places = np.linspace(0, len(rows) - 1, min(n_samples, len(rows))).astype(np.int64)
    return rows[order][places]


def choose_grid(clustered: ClusteredImages, *, n_samples: int) -> dict[int, np.ndarray]:
    """Choose the rows of the grid by label: the largest clusters, then noise."""
    labels = [*range(min(clustered.n_clusters, MAX_CLUSTERS)), *([NOISE] if clustered.n_noise else [])]
    return {label: choose_samples(clustered, label, n_samples=n_samples) for label in labels}


def write_cluster_grid(
    path: Path, clustered: ClusteredImages, grid: Mapping[int, np.ndarray], thumbnails: Mapping[int, np.ndarray]
) -> Path:
    """Write one row of thumbnails for each cluster; `thumbnails` maps rows to [s, s, 3] uint8. Returns path."""
    size = next(iter(thumbnails.values())).shape[0]
    n_columns = max(len(rows) for rows in grid.values())
    step = size + _GAP
    left = _EDGE + _CAPTION
    sheet = _Sheet(max(560, left + n_columns * step + _EDGE), _HEAD + _EDGE + len(grid) * (step + _GAP) + _EDGE)
    hidden = clustered.n_clusters - sum(label != NOISE for label in grid)
    note = f"; the {hidden:,} smallest clusters are not shown" if hidden else ""
    sheet.write_head(
        f"{len(clustered.records):,} images in {clustered.n_clusters:,} clusters",
        f"each row from the most typical image to the one farthest from the centre{note}",
    )
    for i, (label, rows) in enumerate(grid.items()):
        top = _EDGE + _HEAD + i * (step + _GAP)
        n_members = clustered.n_noise if label == NOISE else int(clustered.cluster_sizes[label])
        share = n_members / len(clustered.records)
        sheet.fill((_EDGE, top, _EDGE + 5, top + size), cluster_color(label))
        sheet.write((_EDGE + 18, top + size / 2 - 11), cluster_name(label), size=17, bold=True)
        sheet.write((_EDGE + 18, top + size / 2 + 11), f"{n_members:,} images, {share:.1%}", size=13, color=QUIET)
        for column, row in enumerate(rows):
            sheet.paste(thumbnails[int(row)], left=left + column * step, top=top)
    return sheet.save(path)


def write_comparison(
    path: Path,
    samples: Sequence[Mapping[str, np.ndarray]],
    *,
    names: Sequence[str],
    size: int = 200,
    subtitle: str = "",
) -> Path:
    """Write one column for each image and one row for each of its stages (original, equalised, inverted); returns path.

    `samples` map the name of a stage to grey [h, w] or RGB [h, w, 3] uint8 pixels.
    """
    stages = list(samples[0])
    step = size + _GAP
    left = _EDGE + 108
    width, foot = left + len(samples) * step + _EDGE, 26
    sheet = _Sheet(max(520, width), _EDGE + _HEAD + len(stages) * step + foot + _EDGE)
    sheet.write_head("What the model sees", subtitle)
    for i, stage in enumerate(stages):
        top = _EDGE + _HEAD + i * step
        sheet.write((_EDGE, top + size / 2), stage, size=16, bold=True)
        for column, sample in enumerate(samples):
            sheet.paste(fit_square(as_rgb(sample[stage]), size=size), left=left + column * step, top=top)
    for column, name in enumerate(names):
        place = (left + column * step, _EDGE + _HEAD + len(stages) * step + 12)
        sheet.write(place, sheet.shorten(name, n_pixels=size, size=13), size=13, color=QUIET)
    return sheet.save(path)


def caption(record: ImageRecord) -> str:
    """The file name of an image, fit for a picture."""
    return "".join(letter if letter.isprintable() else "·" for letter in record.shown_path.rsplit("/", 1)[-1])


class _Sheet:
    """A white picture to draw on, at pixel coordinates; texts are placed by the middle of their left edge."""

    def __init__(self, width: int, height: int) -> None:
        from PIL import Image, ImageDraw

        self._image = Image.new("RGB", (width, height), "white")
        self._draw = ImageDraw.Draw(self._image)

    def write_head(self, title: str, subtitle: str) -> None:
        self.write((_EDGE, _EDGE + 10), title, size=24, bold=True)
        self.write((_EDGE, _EDGE + 40), subtitle, size=14, color=QUIET)
        self.fill((_EDGE, _EDGE + 60, self._image.width - _EDGE, _EDGE + 60), LINE)

    def write(self, place: tuple[float, float], text: str, *, size: int, color: str = TEXT, bold: bool = False) -> None:
        # The font that Pillow brings along has one weight: a thin outline of the same colour makes it bolder.
        self._draw.text(place, text, fill=color, font=_font(size), anchor="lm", stroke_width=0.4 if bold else 0)

    def shorten(self, text: str, *, n_pixels: int, size: int) -> str:
        """Cut the middle out of a text until it fits."""
        shown, n_kept = text, len(text)
        while n_kept > 3 and self._draw.textlength(shown, font=_font(size)) > n_pixels:
            n_kept -= 1
            shown = f"{text[: (n_kept + 1) // 2]}…{text[len(text) - n_kept // 2 :]}"
        return shown

    def fill(self, box: tuple[float, float, float, float], color: str) -> None:
        self._draw.rectangle(box, fill=color)

    def paste(self, pixels: np.ndarray, *, left: int, top: int) -> None:
        from PIL import Image

        self._image.paste(Image.fromarray(pixels), (left, top))

    def save(self, path: Path) -> Path:
        content = io.BytesIO()
        self._image.save(content, format="png")
        write_bytes(path, content.getvalue())
        return path


@cache
def _font(size: int) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)  # type: ignore[return-value]  # a real font wherever Pillow has FreeType

"""The interactive scatter: one HTML file with points in 3-D and their thumbnails, which works without any network.

Plotly draws the points; the page around it shows the image under the pointer, the clusters and their images. File names
are data and never markup, and the content security policy of the page lets run only the scripts that are written here.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.commit import write_bytes
from common.escaping import clip_text, escape, image_url
from common.figures import GREY, INKS
from image_parts.records import NOISE, ClusteredImages, cluster_name
from image_parts.sprites import pack_sprites

ASSETS_DIR = Path(__file__).with_name("assets")
POINTS_PER_BUDGET = 5000
MAX_PAGE_BYTES = 20_000_000  # for up to POINTS_PER_BUDGET points; in proportion for more
_MAX_PATH_CHARS = 240
_N_STEPS = 20_000  # coordinates are rounded to this many steps: finer than any screen


@dataclass(frozen=True)
class ScatterPage:
    """A page, and how it came out."""

    html: str
    n_points: int
    thumbnail_size: int  # pixels; less than asked for where the page would have grown too large


def choose_points(clustered: ClusteredImages, *, max_points: int) -> np.ndarray:
    """Choose the rows to draw: all, or of each cluster its share but at least some, spread evenly: [m] ascending."""
    n = len(clustered.records)
    if n <= max_points:
        return np.arange(n)
    labels = [*range(clustered.n_clusters), *([NOISE] if clustered.n_noise else [])]
    members = [clustered.members(label) for label in labels]
    least = max(1, max_points // (4 * len(labels)))
    quotas = np.array([min(len(rows), max(least, len(rows) * max_points // n)) for rows in members])
    while quotas.sum() > max_points and quotas.max() > 1:
        quotas[quotas.argmax()] -= 1
    spread = [
        rows[np.linspace(0, len(rows) - 1, quota).astype(np.int64)] for rows, quota in zip(members, quotas, strict=True)
    ]
    return np.sort(np.concatenate(spread))[:max_points]


def cluster_color(label: int) -> str:
    """The colour of a cluster as #rrggbb: twelve hues, then the same darker and lighter; noise is grey."""
    if label == NOISE:
        return GREY
    hue, turn = INKS[label % len(INKS)], label // len(INKS) % 3
    channels = [int(hue[i : i + 2], 16) for i in (1, 3, 5)]
    end, share = ((0, 0.0), (0, 0.38), (255, 0.45))[turn]
    return "#" + "".join(f"{round(value + (end - value) * share):02x}" for value in channels)


def build_scatter(clustered: ClusteredImages, rows: np.ndarray, thumbnails: np.ndarray, *, title: str) -> ScatterPage:
    """Build the page for the images in `rows` [m] with their thumbnails [m, s, s, 3] uint8."""
    style, script, plotly = _read_assets()
    data = _describe(clustered, rows, title=title)
    n_fixed = sum(len(part.encode()) for part in (style, script, plotly, _as_json(data)))
    allowed = MAX_PAGE_BYTES * max(1.0, len(rows) / POINTS_PER_BUDGET)
    sprites = pack_sprites(thumbnails, max_bytes=int((allowed - n_fixed - 20_000) * 3 / 4))
    data["sprites"] = {
        "sheets": [image_url(sheet) for sheet in sprites.sheets],
        "cell": sprites.cell,
        "size": sprites.size,
        "columns": sprites.n_columns,
        "perSheet": sprites.n_per_sheet,
    }
    return ScatterPage(_page(title, style, script, plotly, data), len(rows), sprites.size)


def write_scatter(page: ScatterPage, path: Path) -> Path:
    """Write the page atomically and return its path."""
    write_bytes(path, page.html.encode("utf-8"))
    return path


def _describe(clustered: ClusteredImages, rows: np.ndarray, *, title: str) -> dict[str, Any]:
    """What the script shows, as plain JSON values."""
    labels = [*range(clustered.n_clusters), *([NOISE] if clustered.n_noise else [])]
    records = [clustered.records[row] for row in rows]
    distances = clustered.distances[rows].astype(np.float64)
    steps, extent = _round_coordinates(clustered.coordinates[rows])
    return {
        "title": title,
        "nImages": len(clustered.records),
        "x": steps[:, 0].tolist(),
        "y": steps[:, 1].tolist(),
        "z": steps[:, 2].tolist(),
        "extent": extent,
        "label": clustered.labels[rows].tolist(),
        "raw": clustered.raw_labels[rows].tolist(),
        "probability": np.round(clustered.probabilities[rows].astype(np.float64), 3).tolist(),
        "distance": [round(value, 3) if np.isfinite(value) else None for value in distances.tolist()],
        "path": [clip_text(record.shown_path, n_chars=_MAX_PATH_CHARS) for record in records],
        "width": [record.width for record in records],
        "height": [record.height for record in records],
        "bytes": [record.n_bytes for record in records],
        "clusters": [
            {"label": label, "name": cluster_name(label), "color": cluster_color(label), "size": size}
            for label, size in zip(labels, [*clustered.cluster_sizes.tolist(), clustered.n_noise], strict=False)
        ],
    }


def _round_coordinates(coordinates: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Coordinates [m, 3] as integers from zero, one scale for all axes, and the extent of each axis."""
    places = np.nan_to_num(coordinates.astype(np.float64))
    low = places.min(axis=0, initial=np.inf) if len(places) else np.zeros(3)
    span = float((places - low).max(initial=0.0)) or 1.0
    steps = np.rint((places - low) / span * _N_STEPS).astype(np.int64)
    return steps, [int(value) for value in steps.max(axis=0, initial=1)]


def _page(title: str, style: str, script: str, plotly: str, data: dict[str, Any]) -> str:
    # Plotly writes styles into the page as it runs, so that styles cannot be held to their hash.
    policy = (
        f"default-src 'none'; script-src '{_hash(plotly)}' '{_hash(script)}'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f'<link rel="icon" href="data:,">\n<style>{style}</style>\n</head>\n<body>\n'
        f"<noscript><p>The points need JavaScript, which this page brings along.</p></noscript>\n"
        f'<script type="application/json" id="data">{_as_json(data)}</script>\n'
        f"<script>{plotly}</script>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _as_json(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _read_assets() -> tuple[str, str, str]:
    """Style, script and Plotly."""
    from plotly.offline import get_plotlyjs

    style = (ASSETS_DIR / "scatter.css").read_text(encoding="utf-8")
    script = (ASSETS_DIR / "scatter.js").read_text(encoding="utf-8")
    return style, f'"use strict";\n{{\n{script}\n}}', get_plotlyjs()


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")

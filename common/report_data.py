"""What the scripts of a report draw: the cells of a table and the points of a map, as JSON can hold them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.escaping import clip_text, image_url, safe_text

_SCATTER_STEPS = 10_000  # coordinates are rounded to this many steps: finer than any screen

Detail = str | bytes
Details = Sequence[Detail] | Mapping[str, Sequence[Detail]] | None


@dataclass(frozen=True)
class Column:
    """A column of a table: text, number, percent (a share as 93.1%), bar (relative to the largest) or meter (a share).

    An `image` cell is bytes of a PNG, JPEG, GIF or WebP picture.
    """

    title: str
    kind: Literal["text", "number", "percent", "bar", "meter", "image"] = "text"
    digits: int | None = None  # decimals; None writes integers whole and other numbers with four digits
    note: str = ""  # said when the pointer rests on the heading


def table_data(
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[object]],
    *,
    details: Sequence[Details] | None,
    details_title: str,
    sort_by: str | None,
    descending: bool,
    page_size: int,
) -> dict[str, Any]:
    """What table.js shows; see `Report.add_table`. Raises ValueError where lengths do not fit."""
    titles = [column.title for column in columns]
    if any(len(row) != len(columns) for row in rows) or (details is not None and len(details) != len(rows)):
        raise ValueError(f"table {title!r}: every row needs {len(columns)} cells, and details one entry per row")
    return {
        "columns": [[column.title, column.kind, column.digits, column.note] for column in columns],
        "rows": [[_cell(value, column) for value, column in zip(row, columns, strict=True)] for row in rows],
        "details": [_details(entry, details_title) for entry in details] if details is not None else None,
        "sort": titles.index(sort_by) if sort_by is not None else None,
        "descending": descending,
        "pageSize": page_size,
        "name": title,
    }


def _cell(value: object, column: Column) -> object:
    """Return a cell as JSON can hold it: a finite number, a text or null."""
    if value is None:
        return None
    if column.kind == "text":
        return safe_text(value)
    if column.kind == "image":
        return image_url(value) if isinstance(value, bytes) else safe_text(value)
    number = float(value)  # type: ignore[arg-type]
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() else float(f"{number:.7g}")


def _details(entry: Details, heading: str) -> list[list[object]]:
    """Return [[heading, items]] where an item is a text or {"src": data URL}."""
    groups = entry if isinstance(entry, Mapping) else {heading: entry or ()}
    return [
        [safe_text(name), [{"src": image_url(x)} if isinstance(x, bytes) else clip_text(x, n_chars=600) for x in items]]
        for name, items in groups.items()
        if items
    ]


def scatter_data(
    points: Any,
    labels: Sequence[object] | None,
    hover_texts: Sequence[str] | None,
    muted_label: object,
    max_points: int,
) -> tuple[dict[str, Any], list[str]]:
    """Return what scatter.js draws, and remarks about points that are not drawn."""
    import numpy as np

    places = np.asarray(points, dtype=np.float64).reshape(len(points), 2)  # [n, 2]
    if any(given is not None and len(given) != len(places) for given in (labels, hover_texts)):
        raise ValueError("labels and hover_texts need one entry per point")
    kept = np.flatnonzero(np.isfinite(places).all(axis=1)).tolist()
    n_lost = len(places) - len(kept)
    remarks = [f"Without coordinates and left out: {n_lost:,}."] if n_lost else []
    if len(kept) > max_points:
        remarks.append(f"{max_points:,} of {len(kept):,} points are drawn.")
        kept = [kept[i] for i in np.linspace(0, len(kept) - 1, max_points).astype(np.int64)]
    names = [safe_text(labels[i]) if labels is not None else "" for i in kept]
    order = [name for name, _ in sorted(Counter(names).items(), key=lambda pair: (-pair[1], pair[0]))]
    muted = safe_text(muted_label) if muted_label is not None else None
    index = {name: i for i, name in enumerate(order)}
    places = places[kept]
    low = places.min(axis=0) if len(places) else np.zeros(2)
    span = float((places.max(axis=0) - low).max()) if len(places) else 1.0
    steps = np.rint((places - low) / (span or 1.0) * _SCATTER_STEPS).astype(np.int64)  # one scale for both axes
    return {
        "x": steps[:, 0].tolist(),
        "y": steps[:, 1].tolist(),
        "label": [index[name] for name in names],
        "names": order,
        "muted": index.get(muted) if muted is not None else None,
        "texts": [clip_text(hover_texts[i], n_chars=160) for i in kept] if hover_texts is not None else None,
    }, remarks

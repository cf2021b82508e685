"""Self-contained HTML reports: one file that works offline, asks nothing of any network and escapes all it shows.

    report = Report("Cluster purity", "runs/demo · 100 clusters")
    report.add_facts({"Rows": 5000, "Purity": percent(0.931)})
    report.add_table("Clusters", [Column("Cluster", "number"), Column("Purity", "meter")], [[0, 0.97]],
                     details=[["an example text", "another"]])
    report.write("runs/demo/report.html")

The content security policy of the page lets run only the script and the style that are written here, by their hash,
so that a text with markup in it stays a text. Equal input gives equal bytes: the page holds no date of its own.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from common import charts
from common.charts import format_number, percent
from common.commit import write_bytes
from common.escaping import clip_text, escape, image_url, safe_text
from common.report_data import Column, Details, scatter_data, table_data

__all__ = ["Column", "Report", "clip_text", "format_number", "percent", "safe_text"]

ASSETS_DIR = Path(__file__).with_name("report_assets")
SCRIPT_NAMES = ("page.js", "table.js", "scatter.js")
MAX_COLUMNS_IN_CHART = 500  # more bars than this are thinner than a pixel
MAX_NAMED_BARS = 25

Width = Literal["half", "full"]


class Report:
    """A page that is composed top to bottom by `add_…` and written once."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._sections: list[str] = []
        self._headings: list[tuple[str, str]] = []  # (anchor, title)
        self._own_assets: dict[tuple[str, str], None] = {}  # (style, script) of widgets, each once

    def add_text(self, text: str, *, title: str = "") -> None:
        """Add paragraphs; an empty line begins a new one."""
        paragraphs = "".join(f'<p dir="auto">{escape(part)}</p>' for part in re.split(r"\n\s*\n", text.strip()))
        self._add(title, f'<div class="prose">{paragraphs}</div>', kind="plain")

    def add_facts(self, facts: Mapping[str, object], *, notes: Mapping[str, str] | None = None) -> None:
        """Add tiles of a name and a value; numbers are formatted, texts shown as they are, notes go below."""
        tiles = []
        for name, value in facts.items():
            shown = value if isinstance(value, str) else format_number(value)
            note = f'<dd class="note">{escape((notes or {})[name])}</dd>' if name in (notes or {}) else ""
            tiles.append(f'<div><dt>{escape(name)}</dt><dd class="value">{escape(shown)}</dd>{note}</div>')
        # As few lines of up to six tiles as can be, filled evenly: 8 as 4 + 4, 7 as 4 + 3.
        n_across = math.ceil(len(tiles) / max(1, math.ceil(len(tiles) / 6)))
        self._add("", f'<dl class="facts of-{n_across}">{"".join(tiles)}</dl>', kind="plain")

    def add_table(
        self,
        title: str,
        columns: Sequence[Column],
        rows: Sequence[Sequence[object]],
        *,
        note: str = "",
        details: Sequence[Details] | None = None,
        details_title: str = "Examples",
        sort_by: str | None = None,
        descending: bool = False,
        page_size: int = 25,
    ) -> None:
        """Add a table that sorts, searches and pages; rows are sequences in the order of columns.

        details holds one entry per row, shown when the row is opened: texts or pictures (bytes), or a mapping from a
        heading to them. sort_by is the title of a column. Raises ValueError where lengths do not fit.
        """
        data = table_data(
            title,
            columns,
            rows,
            details=details,
            details_title=details_title,
            sort_by=sort_by,
            descending=descending,
            page_size=page_size,
        )
        self._add(title, _placeholder("table", self._next_id(), data), note=note)

    def add_histogram(
        self,
        title: str,
        values: Sequence[float],
        *,
        bins: int | Sequence[float] = 20,
        as_percent: bool = False,
        y_label: str = "",
        note: str = "",
        width: Width = "half",
    ) -> None:
        """Add a histogram of the finite values; bins is their number or their edges."""
        edges, counts = charts.histogram_counts(values, bins=bins)
        write = percent if as_percent else format_number
        ranges = [f"{write(left)} to {write(right)}" for left, right in itertools.pairwise(edges)]
        body = charts.histogram_svg(edges, counts, as_percent=as_percent, y_label=y_label)
        self._add_chart(title, body, ["Range", y_label or "Count"], zip(ranges, counts, strict=True), note, width)

    def add_bars(
        self,
        title: str,
        values: Mapping[str, float] | Sequence[tuple[str, float]],
        *,
        as_percent: bool = False,
        y_label: str = "",
        note: str = "",
        width: Width = "half",
    ) -> None:
        """Add bars in the order given: up to 25 lie, each with its name; more stand, named when pointed at."""
        given = values.items() if isinstance(values, Mapping) else values
        pairs = [(str(name), float(value)) for name, value in given]
        if len(pairs) > MAX_COLUMNS_IN_CHART:
            note = f"{note} The first {MAX_COLUMNS_IN_CHART} of {len(pairs):,} are shown.".strip()
            pairs = pairs[:MAX_COLUMNS_IN_CHART]
        names, numbers = [name for name, _ in pairs], [value for _, value in pairs]
        write = percent if as_percent else format_number
        if len(pairs) <= MAX_NAMED_BARS:
            self._add(title, charts.bars_html(names, numbers, as_percent=as_percent), note=note, width=width)
            return
        body = charts.columns_svg(names, numbers, as_percent=as_percent, y_label=y_label)
        rows = [(name, write(value)) for name, value in pairs]
        self._add_chart(title, body, ["Name", y_label or "Value"], rows, note, width)

    def add_lines(
        self,
        title: str,
        series: Mapping[str, Sequence[tuple[float, float]]],
        *,
        as_percent: bool = False,
        log_x: bool = False,
        from_zero: bool = False,
        x_label: str = "",
        y_label: str = "",
        note: str = "",
        width: Width = "half",
    ) -> None:
        """Add one line per series of (x, y) points, such as a score per number of clusters."""
        points = {name: [(float(x), float(y)) for x, y in line] for name, line in series.items()}
        body = charts.lines_svg(points, as_percent=as_percent, log_x=log_x, y_label=y_label, from_zero=from_zero)
        body += f'<p class="axis below">{escape(x_label)}</p>' if x_label else ""
        write = percent if as_percent else format_number
        rows = [(name, format_number(x), write(y)) for name, line in points.items() for x, y in line]
        header = ["Series", x_label or "x", y_label or "y"]
        self._add_chart(title, charts.legend_html(list(points)) + body, header, rows, note, width)

    def add_scatter(
        self,
        title: str,
        points: Any,
        *,
        labels: Sequence[object] | None = None,
        hover_texts: Sequence[str] | None = None,
        muted_label: object = None,
        note: str = "",
        max_points: int = 20_000,
    ) -> None:
        """Add a map of points [n, 2] that can be hovered over, zoomed and searched by label.

        muted_label (noise) is drawn grey. Points without finite coordinates are left out; of more than max_points
        every so-manieth is drawn; the page says both.
        """
        data, remarks = scatter_data(points, labels, hover_texts, muted_label, max_points)
        note = " ".join(part for part in [note, *remarks] if part)
        data["name"] = title
        self._add(title, _placeholder("scatter", self._next_id(), data), note=note)

    def add_image(self, image: bytes, *, alt: str, title: str = "", note: str = "", width: Width = "full") -> None:
        """Add a picture (PNG, JPEG, GIF or WebP bytes); alt says what it shows to who cannot see it."""
        body = f'<img class="picture" src="{image_url(image)}" alt="{escape(alt)}">'
        self._add(title, body, note=note, width=width)

    def add_images(self, title: str, images: Sequence[tuple[bytes, str]], *, note: str = "") -> None:
        """Add a gallery of (picture bytes, caption)."""
        figures = "".join(
            f'<figure><img src="{image_url(image)}" alt="{escape(caption)}" loading="lazy">'
            f'<figcaption dir="auto">{escape(caption)}</figcaption></figure>'
            for image, caption in images
        )
        self._add(title, f'<div class="gallery">{figures}</div>', note=note)

    def add_widget(
        self, title: str, kind: str, data: Mapping[str, Any], *, style: str, script: str, note: str = ""
    ) -> None:
        """Add `<div data-KIND="ID">`, which `script` fills from the JSON element of that id, as the page's own do.

        style and script are code, never anybody's text. The script runs after the page's, in one scope with it.
        """
        self._own_assets[style, script] = None
        self._add(title, _placeholder(kind, self._next_id(), data), note=note)

    def to_html(self) -> str:
        """Return the whole page."""
        style, script = _read_assets(tuple(self._own_assets))
        links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title in self._headings)
        contents = f'<nav aria-label="Contents">{links}</nav>' if len(self._headings) > 2 else ""
        subtitle = f'<p class="subtitle" dir="auto">{escape(self.subtitle)}</p>' if self.subtitle else ""
        policy = (
            f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
            "base-uri 'none'; form-action 'none'"
        )
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta name="color-scheme" content="light dark">\n<title>{escape(self.title)}</title>\n'
            f'<link rel="icon" href="data:,">\n<style>{style}</style>\n</head>\n<body>\n'
            f'<header><h1 dir="auto">{escape(self.title)}</h1>{subtitle}{contents}</header>\n'
            f"<noscript><p>Tables and maps need JavaScript, which this page brings along.</p></noscript>\n"
            f"<main>\n{chr(10).join(self._sections)}\n</main>\n"
            f'<div id="tip" role="status" hidden></div>\n<script>{script}</script>\n</body>\n</html>\n'
        )

    def write(self, path: str | Path) -> Path:
        """Write the page so that path never holds a part of it, and return path."""
        write_bytes(path, self.to_html().encode("utf-8"))
        return Path(path)

    def _add_chart(self, title: str, body: str, header: Sequence[str], rows: Any, note: str, width: Width) -> None:
        """Add a chart and, for who cannot see it, its numbers as a plain table that opens."""
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
        lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        numbers = f'<details class="numbers"><summary>Numbers</summary><div class="scroll"><table><thead><tr>{head}'
        self._add(
            title, f"{body}{numbers}</tr></thead><tbody>{lines}</tbody></table></div></details>", note=note, width=width
        )

    def _add(self, title: str, body: str, *, note: str = "", width: Width = "full", kind: str = "card") -> None:
        anchor = f"section-{len(self._sections)}"
        heading = f"<h2>{escape(title)}</h2>" if title else ""
        if title:
            self._headings.append((anchor, title))
        note = f'<p class="note" dir="auto">{escape(note)}</p>' if note else ""
        self._sections.append(f'<section id="{anchor}" class="{kind} {width}">{heading}{note}{body}</section>')

    def _next_id(self) -> str:
        return f"data-{len(self._sections)}"


@functools.cache
def _read_assets(own: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    """Return the style and the script of the page, with those of its widgets at their ends."""
    style = (ASSETS_DIR / "report.css").read_text(encoding="utf-8")
    script = "\n".join((ASSETS_DIR / name).read_text(encoding="utf-8") for name in SCRIPT_NAMES)
    style = "\n".join([style, *(added for added, _ in own)])
    script = "\n".join([script, *(added for _, added in own)])
    return style, f'"use strict";\n{{\n{script}\n}}'


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _placeholder(kind: str, data_id: str, data: Mapping[str, Any]) -> str:
    """Return the element that the script fills, with its data as JSON that cannot end its script element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    text = text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return f'<div data-{kind}="{data_id}"></div><script type="application/json" id="{data_id}">{text}</script>'

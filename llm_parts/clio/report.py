"""The page for people: a tree to walk down, the map beside it, search, and the metric tables, in one HTML file.

The parts that move are in `assets/`. Conversations travel as typed arrays in base64 and as one long text, not as an
object each: a hundred thousand of them are a page of some twenty megabytes that opens in two seconds.
"""

from __future__ import annotations

import base64
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.escaping import clip_text, safe_text
from common.report import Column, Report, percent
from llm_parts.clio.comparison import COMPARISON_TITLE, placements
from llm_parts.clio.taxonomy import NOISE, ClioReport, ClusterName, Hierarchy, count_sizes

ASSETS_DIR = Path(__file__).with_name("assets")
SCRIPT_NAMES = ("model.js", "map.js", "tree.js", "explorer.js")
WARNINGS_TITLE = "Warnings"  # a table of this title is shown as text
HIERARCHY_TITLES = {"llm": "By language model", "linkage": "By linkage"}
HIERARCHY_NOTES = {
    "llm": "Broader clusters proposed by the model, and each cluster sorted into one of them by it",
    "linkage": "Clusters merged step by step with the nearest one, by Ward's criterion",
}

TEXT_CHARS = (220, 4000)  # of a conversation: at least, at most
TEXTS_CHARS = 24_000_000  # of all of them: what a page can hold and still open at once
SHORT_TEXT_CHARS = 300  # in the tables
LINE_BREAK = "\u2028"  # within a text, since lines hold texts
ID_CHARS = 60
MAX_SHOWN = 200_000  # conversations in the page; of more, an even sample
MAP_STEPS = 60_000  # coordinates are rounded to so many steps: a pixel at 60 times the size of a screen
OFF_MAP = 0xFFFF  # coordinate of a conversation without a place
MAX_FACET_VALUES = 24  # more values cannot be told apart by colour
MIN_VALUE_COUNT = 5  # conversations behind a worded value that is shown: a rarer one may point to one person
NO_VALUE = 255
EXAMPLES_PER_CLUSTER = 5
MAX_CLUSTERS_WITH_EXAMPLES = 2_000  # in the table; the tree shows them for all
NAMES_IN_CAPITALS = ("acc", "ami", "ari", "llm", "nmi")
SHORT_NAMES = {
    "n_clusters": "Clusters",
    "largest_share": "Largest",
    "cophenetic_correlation": "Cophenetic",
    "same_when_swapped": "Swapped",
}
SHARES = frozenset(  # shown as percentages
    (
        *("largest_share", "label_purity", "judge_vote", "share", "purity", "rate", "in_a_cluster"),
        *("under_the_right_top", "chose_the_name", "first_wins", "second_wins", "ties", "low", "high"),
        *("same_when_swapped", "scored_4_or_5", "same", "names_kept", "top_label_purity"),
    )
)


def render_clio_report(report: ClioReport) -> Report:
    """The page of a run, which works offline and asks nothing of any network; texts in it stay texts."""
    sizes = count_sizes(report.base_labels, n_clusters=len(report.base_names))
    n_rows, n_inside = len(report.conversation_ids), int(sizes.sum())
    page = Report("What the conversations are about", f"{n_rows:,} conversations, grouped by Clio")
    page.add_facts(_facts(report, n_inside=n_inside))
    warnings = _warnings(report)
    if warnings:
        page.add_text("\n\n".join(warnings), title="To know before you read on")
    _add_explorer(page, report, sizes)
    _add_facets(page, report)
    _add_tables(page, report)
    _add_clusters(page, report, sizes)
    _add_audit(page, report.audit)
    return page


def _warnings(report: ClioReport) -> list[str]:
    """What did not go as asked for, each once, as sentences."""
    found = [text for hierarchy in report.hierarchies for text in hierarchy.warnings]
    found += [str(next(iter(row.values()))) for title, rows in report.tables if title == WARNINGS_TITLE for row in rows]
    return [f"{text[:1].upper()}{text[1:].rstrip('.')}." for text in dict.fromkeys(found) if text]


def _facts(report: ClioReport, *, n_inside: int) -> dict[str, object]:
    n_rows = len(report.conversation_ids)
    shape = " > ".join(str(len(level.names)) for level in report.hierarchies[0].levels) if report.hierarchies else ""
    return {
        "Conversations": n_rows,
        "In a cluster": percent(n_inside / n_rows if n_rows else math.nan),
        "Base clusters": len(report.base_names),
        "Levels above them, from the top": shape or "none",
    }


# --- The explorer ----------------------------------------------------------------------------------------------------


def _add_explorer(page: Report, report: ClioReport, sizes: np.ndarray) -> None:
    style, script = _read_assets()
    n_off = int((~np.isfinite(report.map_xy).all(axis=1)).sum()) if len(report.map_xy) else 0
    note = (
        "Open a cluster in the list to see what is in it; the map shows the same clusters in colour. Each dot is a "
        "conversation, close to others like it; how far apart two groups lie means little."
    )
    note += f" Without a place on the map: {n_off:,}." if n_off else ""
    n_rows = len(report.conversation_ids)
    note += f" Dots and search hold {MAX_SHOWN:,} of {n_rows:,} conversations." if n_rows > MAX_SHOWN else ""
    page.add_widget("Explore", "explorer", explorer_data(report, sizes), style=style, script=script, note=note)


def explorer_data(report: ClioReport, sizes: np.ndarray) -> dict[str, Any]:
    """What the explorer's script reads: arrays in base64, texts as lines; sizes [n_base] are conversations."""
    n_rows, texts = len(report.conversation_ids), report.shown_texts()
    shown = np.linspace(0, n_rows - 1, min(n_rows, MAX_SHOWN)).astype(np.int64)
    steps, extent = _round_places(report.map_xy[shown])
    hierarchies = report.hierarchies or [Hierarchy("clusters", [], calls=0, cost=0.0)]
    return {
        "total": n_rows,
        "noise": n_rows - int(sizes.sum()),
        "x": _packed(steps[:, 0], "<u2"),
        "y": _packed(steps[:, 1], "<u2"),
        "extent": extent,
        "base": _packed(report.base_labels[shown], "<i4"),
        "texts": _lines([texts[row] for row in shown], n_chars=_chars_of_texts(len(shown))),
        "ids": _lines([report.conversation_ids[row] for row in shown], n_chars=ID_CHARS),
        "baseClusters": [[*_words(name), size] for name, size in zip(report.base_names, sizes.tolist(), strict=True)],
        "hierarchies": [_hierarchy_data(hierarchy) for hierarchy in hierarchies],
        "facets": [
            facet
            for name, values in report.facets.items()
            if (facet := _facet_data(name, [values[row] for row in shown]))
        ],
    }


def _hierarchy_data(hierarchy: Hierarchy) -> dict[str, Any]:
    return {
        "kind": hierarchy.kind,
        "title": HIERARCHY_TITLES.get(hierarchy.kind, safe_text(hierarchy.kind)),
        "note": HIERARCHY_NOTES.get(hierarchy.kind, ""),
        "levels": [
            {"names": [_words(name) for name in level.names], "parents": level.parent_of.tolist()}
            for level in hierarchy.levels
        ],
    }


def _words(name: ClusterName) -> list[str]:
    return [clip_text(name.name, n_chars=160), clip_text(name.summary, n_chars=600)]


def _facet_data(name: str, values: Sequence[Any]) -> dict[str, Any] | None:
    """A facet of few values as codes; None for one that colours cannot show. Rare worded values count as none."""
    counts = Counter(value for value in values if _has_value(value))
    is_numeric = all(isinstance(value, int | float) for value in counts)
    if not is_numeric:
        counts = Counter({value: count for value, count in counts.items() if count >= MIN_VALUE_COUNT})
    if not 2 <= len(counts) <= MAX_FACET_VALUES:
        return None
    order = sorted(counts) if is_numeric else sorted(counts, key=lambda value: (-counts[value], str(value)))
    codes = {value: code for code, value in enumerate(order)}
    return {
        "name": safe_text(name),
        "values": [clip_text(_as_text(value), n_chars=60) for value in order],
        "counts": [counts[value] for value in order],
        "isNumeric": is_numeric,
        "codes": _packed(
            np.array([codes.get(value, NO_VALUE) if _has_value(value) else NO_VALUE for value in values]), "u1"
        ),
    }


def _has_value(value: Any) -> bool:
    """Whether a facet was answered; what could not be counted (a list) was not."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and value != ""


def _as_text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _round_places(map_xy: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Places [n, 2] as integers from zero, one scale for both axes, OFF_MAP where there is none; and their extent."""
    places = np.asarray(map_xy, dtype=np.float64).reshape(-1, 2)
    is_there = np.isfinite(places).all(axis=1)
    steps = np.full(places.shape, OFF_MAP, dtype=np.int64)
    if not is_there.any():
        return steps, [1, 1]
    low = places[is_there].min(axis=0)
    span = float((places[is_there] - low).max()) or 1.0
    steps[is_there] = np.rint((places[is_there] - low) / span * MAP_STEPS).astype(np.int64)
    return steps, [int(value) for value in np.maximum(1, steps[is_there].max(axis=0))]


def _lines(texts: Sequence[str], *, n_chars: int) -> str:
    """Texts as the lines of one; the line breaks of a text are LINE_BREAK."""
    return "\n".join(_one_line(safe_text(text[: 2 * n_chars]), n_chars=n_chars) for text in texts)


def _one_line(text: str, *, n_chars: int) -> str:
    lines = (" ".join(line.split()) for line in text.splitlines())
    joined = LINE_BREAK.join(line for line in lines if line)
    return joined if len(joined) <= n_chars else f"{joined[:n_chars].rstrip()}…"


def _chars_of_texts(n_texts: int) -> int:
    least, most = TEXT_CHARS
    return min(most, max(least, TEXTS_CHARS // max(1, n_texts)))


def _packed(numbers: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(numbers).astype(kind).tobytes()).decode("ascii")


@functools.cache
def _read_assets() -> tuple[str, str]:
    """Style and script of the explorer."""
    style = (ASSETS_DIR / "explorer.css").read_text(encoding="utf-8")
    return style, "\n".join((ASSETS_DIR / name).read_text(encoding="utf-8") for name in SCRIPT_NAMES)


# --- Tables ----------------------------------------------------------------------------------------------------------


def _add_clusters(page: Report, report: ClioReport, sizes: np.ndarray) -> None:
    """All base clusters as a table: to sort and to copy from."""
    if not report.base_names:
        return
    n_inside = max(1, int(sizes.sum()))
    kinds = [HIERARCHY_TITLES.get(hierarchy.kind, hierarchy.kind) for hierarchy in report.hierarchies]
    columns = [Column("Cluster"), Column("Conversations", "bar"), Column("Share", "percent"), *map(Column, kinds)]
    paths = [placements(hierarchy, report.base_names) if hierarchy.levels else [] for hierarchy in report.hierarchies]
    examples = _examples(report)
    rows, details = [], []
    for number, name in enumerate(report.base_names):
        above = [path[number] if path else "" for path in paths]
        rows.append([name.name, int(sizes[number]), sizes[number] / n_inside, *above])
        details.append({"Summary": [name.summary] if name.summary else [], "Conversations": examples[number]})
    page.add_table("All base clusters", columns, rows, details=details, sort_by="Conversations", descending=True)


def _examples(report: ClioReport) -> list[list[str]]:
    """The first few conversations of each base cluster; none where there are very many clusters."""
    examples: list[list[str]] = [[] for _ in report.base_names]
    if len(examples) > MAX_CLUSTERS_WITH_EXAMPLES:
        return examples
    for label, text in zip(report.base_labels.tolist(), report.hover, strict=True):
        if label != NOISE and len(examples[label]) < EXAMPLES_PER_CLUSTER:
            examples[label].append(clip_text(text, n_chars=SHORT_TEXT_CHARS))
    return examples


def _add_facets(page: Report, report: ClioReport) -> None:
    for name, values in report.facets.items():
        facet = _facet_data(name, values)
        if facet:
            page.add_bars(f"Facet: {name}", list(zip(facet["values"], facet["counts"], strict=True)))


def _add_tables(page: Report, report: ClioReport) -> None:
    for title, rows in report.tables:
        if title == COMPARISON_TITLE:
            _add_comparison(page, rows)
        elif rows and title != WARNINGS_TITLE:
            _add_rows(page, title, rows)


def _add_comparison(page: Report, rows: Sequence[Mapping[str, Any]]) -> None:
    note = (
        "Both stand on the same base clusters; level 1 is the top. Purity and NMI are against labels, where there is "
        "a label column; finer levels are purer by nature. Cophenetic: the correlation of how high two base clusters "
        "meet with how far apart they lie. It, the judge's vote, calls and cost are of the whole tree."
    )
    named = [{**row, "hierarchy": HIERARCHY_TITLES.get(str(row["hierarchy"]), row["hierarchy"])} for row in rows]
    _add_rows(page, COMPARISON_TITLE, named, note=note)
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in named:
        if row.get("label_purity") is not None:
            lines.setdefault(str(row["hierarchy"]), []).append((float(row["n_clusters"]), float(row["label_purity"])))
    if any(len(points) > 1 for points in lines.values()):
        ordered = {title: sorted(points) for title, points in lines.items()}
        x_label = "clusters of the level"
        page.add_lines(
            "Label purity by level", ordered, as_percent=True, x_label=x_label, y_label="purity", width="full"
        )


def _add_rows(page: Report, title: str, rows: Sequence[Mapping[str, Any]], *, note: str = "") -> None:
    """A table of mappings: a column holds numbers where all its values are numbers."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns, cells = [], []
    for name in names:
        values = [_plain(row.get(name)) for row in rows]
        is_number = any(value is not None for value in values) and all(
            value is None or isinstance(value, int | float) for value in values
        )
        kind = "percent" if name in SHARES else "number"
        columns.append(Column(_heading(name), kind if is_number else "text"))  # type: ignore[arg-type]
        cells.append(values if is_number else [None if value is None else _as_text(value) for value in values])
    page.add_table(title, columns, [list(row) for row in zip(*cells, strict=True)], note=note)


def _plain(value: Any) -> Any:
    """A cell of a table as a number, a text or None."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_as_text(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_as_text, value))
    return value


def _heading(name: str) -> str:
    """`label_nmi` as people read it: Label NMI."""
    words = [word.upper() if word in NAMES_IN_CAPITALS else word for word in str(name).split("_") if word]
    text = SHORT_NAMES.get(str(name), " ".join(words))
    return text[:1].upper() + text[1:]


def _add_audit(page: Report, audit: Mapping[str, Any]) -> None:
    rows = [[_heading(name), _as_text(_plain(value))] for name, value in _flat(audit)]
    if rows:
        note = "What was masked, dropped or hidden, and where, so that no single person can be recognised."
        page.add_table("Privacy audit", [Column("What"), Column("Value")], rows, note=note)


def _flat(audit: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in audit.items():
        path = f"{before}: {name}" if before else str(name)
        found += _flat(value, path) if isinstance(value, Mapping) else [(path, value)]
    return found

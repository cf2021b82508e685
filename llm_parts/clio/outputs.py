"""The files of a finished run: the taxonomy, where each conversation stands in it, facets, comparison, map, report.

    taxonomy.json             {"llm": root, "linkage": root}, nodes {id, name, summary, size, children}
    clusters.parquet          conversation_id, cluster_id (-1: none), cluster_name, llm_level_1…, linkage_level_1…
    facets.parquet            conversation_id and a column for each facet
    hierarchy_comparison.csv  a row per level and hierarchy
    map.png                   the map, coloured by the top level
    embedding_atlas.parquet   all of it for `embedding-atlas FILE --text text --x x --y y`
    report.html               the page for people

Every file is whole or not there, and equal reports give equal bytes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.commit import atomic_file, make_folder, write_bytes, write_json
from common.escaping import clip_text, safe_text
from llm_parts.clio.comparison import COLUMNS, COMPARISON_TITLE, compare_hierarchies
from llm_parts.clio.report import render_clio_report
from llm_parts.clio.taxonomy import (
    NOISE,
    ClioReport,
    ClusterName,
    Hierarchy,
    Level,
    TaxonomyNode,
    base_paths,
    build_tree,
    count_sizes,
    level_names,
)

if TYPE_CHECKING:
    import pyarrow as pa

TAXONOMY_NAME = "taxonomy.json"
CLUSTERS_NAME = "clusters.parquet"
FACETS_NAME = "facets.parquet"
COMPARISON_NAME = "hierarchy_comparison.csv"
MAP_NAME = "map.png"
ATLAS_NAME = "embedding_atlas.parquet"
REPORT_NAME = "report.html"
FILE_NAMES = (TAXONOMY_NAME, CLUSTERS_NAME, FACETS_NAME, COMPARISON_NAME, MAP_NAME, ATLAS_NAME, REPORT_NAME)

NOISE_NAME = "in no cluster"
_ATLAS_CHARS = 500  # of a text

Columns = dict[str, "Sequence[Any] | np.ndarray"]


def write_clio_outputs(report: ClioReport, output_dir: str | Path) -> None:
    """Write all files of a run into `output_dir`, the page for people last.

    Raises ValueError where the parts of the report are of different lengths, OSError where the disk refuses.
    """
    report = _cleaned(report)
    _require_equal_lengths(report)
    folder = make_folder(Path(output_dir))
    write_json(folder / TAXONOMY_NAME, taxonomy_json(report))
    _write_parquet(folder / CLUSTERS_NAME, cluster_columns(report))
    _write_parquet(folder / FACETS_NAME, facet_columns(report))
    write_bytes(folder / COMPARISON_NAME, _comparison_csv(report).encode())
    _write_map(folder / MAP_NAME, report)
    _write_parquet(folder / ATLAS_NAME, _atlas_columns(report))
    render_clio_report(report).write(folder / REPORT_NAME)


def taxonomy_json(report: ClioReport) -> dict[str, Any]:
    """A tree for each hierarchy, all conversations at its root."""
    sizes = count_sizes(report.base_labels, n_clusters=len(report.base_names))
    trees = {}
    for hierarchy in report.hierarchies:
        children = build_tree(hierarchy, base_names=report.base_names, sizes=sizes)
        root = TaxonomyNode(hierarchy.kind, "All conversations", "", int(sizes.sum()), children)
        trees[hierarchy.kind] = asdict(root)
    return trees


def cluster_columns(report: ClioReport) -> Columns:
    """The columns of clusters.parquet: each conversation's cluster, and the names on its path, the top first."""
    columns: Columns = {
        "conversation_id": report.conversation_ids,
        "cluster_id": report.base_labels.astype(np.int64),
        "cluster_name": _of_conversations([name.name for name in report.base_names], report.base_labels),
    }
    for hierarchy in report.hierarchies:
        columns |= _path_columns(hierarchy, report)
    return columns


def _path_columns(hierarchy: Hierarchy, report: ClioReport) -> Columns:
    paths = base_paths(hierarchy, n_base=len(report.base_names))
    levels = level_names(hierarchy, report.base_names)
    columns: Columns = {}
    for depth, (names, numbers) in enumerate(zip(levels, paths.tolist(), strict=True), start=1):
        of_base = [names[number].name for number in numbers]
        columns[f"{hierarchy.kind}_level_{depth}"] = _of_conversations(of_base, report.base_labels)
    return columns


def _of_conversations(of_base: Sequence[str], base_labels: np.ndarray) -> list[str | None]:
    """What is said of base clusters, for each conversation; None for those in no cluster."""
    return [of_base[label] if label != NOISE else None for label in base_labels.tolist()]


def facet_columns(report: ClioReport) -> Columns:
    """The columns of facets.parquet; a facet that would hide another column is called facet_NAME."""
    return {"conversation_id": report.conversation_ids, **_with_facets(report, taken=("conversation_id",))}


def _with_facets(report: ClioReport, *, taken: Collection[str]) -> Columns:
    return {f"facet_{name}" if name in taken else name: values for name, values in report.facets.items()}


def _atlas_columns(report: ClioReport) -> Columns:
    known = {
        **cluster_columns(report),
        "x": report.map_xy[:, 0].astype(np.float32),
        "y": report.map_xy[:, 1].astype(np.float32),
        "text": [clip_text(text, n_chars=_ATLAS_CHARS) for text in report.shown_texts()],
    }
    return {**known, **_with_facets(report, taken=known)}


def _comparison_csv(report: ClioReport) -> str:
    rows = next((rows for title, rows in report.tables if title == COMPARISON_TITLE), None)
    if rows is None:
        rows = compare_hierarchies(report.hierarchies, base_labels=report.base_labels, true_labels=None, centroids=None)
    text = io.StringIO(newline="")
    names = list(dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)]))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write_map(path: Path, report: ClioReport) -> None:
    from common.figures import write_scatter_png

    columns = _path_columns(report.hierarchies[0], report) if report.hierarchies else {}
    top: Any = next(iter(columns.values()), _of_conversations([n.name for n in report.base_names], report.base_labels))
    labels = [NOISE_NAME if name is None else name for name in top]
    n_noise = int((report.base_labels == NOISE).sum())
    n_groups = len(set(labels) - {NOISE_NAME})
    title = f"{len(labels):,} conversations in {n_groups:,} top-level clusters; grey: {n_noise:,} {NOISE_NAME}"
    write_scatter_png(path, report.map_xy, labels=labels, muted_label=NOISE_NAME, title=title)


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _write_parquet(path: Path, columns: Columns) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: _column(values) for name, values in columns.items()})
    with atomic_file(path) as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def _column(values: Sequence[Any] | np.ndarray) -> pa.Array:
    """Numbers where all are numbers, else texts; null for None and NaN."""
    import pyarrow as pa

    if isinstance(values, np.ndarray):
        return pa.array(values)
    filled = [value for value in values if value is not None]
    if filled and all(isinstance(value, int | float) and not isinstance(value, bool) for value in filled):
        return pa.array([None if value is None else float(value) for value in values], pa.float64(), from_pandas=True)
    return pa.array([None if value is None else safe_text(value) for value in values], pa.string())


# --- What came in ----------------------------------------------------------------------------------------------------


def _cleaned(report: ClioReport) -> ClioReport:
    """The same report with texts that every file can hold: no lone surrogates, no control characters."""
    return replace(
        report,
        conversation_ids=[safe_text(name) for name in report.conversation_ids],
        base_names=_clean_names(report.base_names),
        hierarchies=[
            replace(hierarchy, levels=[Level(_clean_names(level.names), level.parent_of) for level in hierarchy.levels])
            for hierarchy in report.hierarchies
        ],
        hover=[safe_text(text) for text in report.hover],
        facets={
            safe_text(column): [safe_text(value) if isinstance(value, str) else value for value in values]
            for column, values in report.facets.items()
        },
    )


def _clean_names(names: Sequence[ClusterName]) -> list[ClusterName]:
    return [ClusterName(safe_text(name.name), safe_text(name.summary)) for name in names]


def _require_equal_lengths(report: ClioReport) -> None:
    n = len(report.conversation_ids)
    lengths = {"base_labels": len(report.base_labels), "map_xy": len(report.map_xy), "hover": len(report.hover)}
    lengths |= {f"facet {name}": len(values) for name, values in report.facets.items()}
    wrong = {name: length for name, length in lengths.items() if length != n}
    if wrong:
        raise ValueError(f"a report of {n} conversations has other numbers of {wrong}")
    highest = int(report.base_labels.max(initial=NOISE))
    if highest >= len(report.base_names):
        raise ValueError(f"base label {highest} has no name: there are {len(report.base_names)}")

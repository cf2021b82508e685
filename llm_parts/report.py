"""The quality report of a batch: JSON for programs, and one self-contained HTML page for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.commit import write_json
from common.report import Column, Report, percent
from llm_parts.checks import ClusterCheck, repeated_names
from llm_parts.registry import ClusterRecord, ClusterRegistry
from llm_parts.requests import RequestTable
from llm_parts.results import Assignment, coverage_of

N_EXAMPLES = 5
N_QUARANTINED_SHOWN = 200


@dataclass(frozen=True)
class ReportInputs:
    """All that a report is made of."""

    batch_id: str
    table: RequestTable
    assignments: Sequence[Assignment]
    registry: ClusterRegistry
    new_clusters: Sequence[ClusterRecord]
    counts: dict[str, int]
    checks: Sequence[ClusterCheck]
    scores: dict[str, Any]
    ledger: dict[str, Any]
    model: str
    max_failure_rate: float
    warnings: Sequence[str] = ()


def build_report(inputs: ReportInputs) -> dict[str, Any]:
    """The report as JSON-ready values."""
    assignments = inputs.assignments
    decisions = Counter(assignment.decision for assignment in assignments)
    n_quarantined = decisions["quarantined"]
    return {
        "batch_id": inputs.batch_id,
        "model": inputs.model,
        "warnings": list(inputs.warnings),
        "requests": {
            "total": len(assignments),
            "assigned": sum(assignment.cluster_id is not None for assignment in assignments),
            "decisions": dict(sorted(decisions.items())),
            "empty": inputs.table.n_empty,
            "cut": inputs.table.n_cut,
            "duplicate_request_ids": inputs.table.n_duplicate_ids,
        },
        "coverage": round(coverage_of(assignments), 4),
        "n_clusters": len(inputs.registry.live()),
        "n_clusters_used": len({entry.cluster_id for entry in assignments} - {None}),
        "n_new_clusters": len(inputs.new_clusters),
        "counts": inputs.counts,
        "clusters": _clusters(inputs),
        "quality": _quality(inputs),
        "scores": inputs.scores,
        "failures": {
            "attempts": inputs.ledger["failures"]["attempts"],
            "quarantined": n_quarantined,
            "quarantined_calls": inputs.ledger["failures"]["quarantined"],
            "rate": n_quarantined / len(assignments) if assignments else 0.0,
            "max_failure_rate": inputs.max_failure_rate,
            "quarantined_requests": [
                {"request_id": entry.request_id, "reason": entry.rationale}
                for entry in assignments
                if entry.decision == "quarantined"
            ],
        },
        "cost": {name: inputs.ledger[name] for name in ("calls", "cached", "tokens_in", "tokens_out", "cost")},
        "steps": inputs.ledger["steps"],
    }


def write_report(report: dict[str, Any], *, json_path: Path, html_path: Path) -> None:
    """Write both forms of a report."""
    write_json(json_path, report)
    render_html(report).write(html_path)


def render_html(report: dict[str, Any]) -> Report:
    """The page that shows a report."""
    page = Report(
        f"Request clusters: {report['batch_id']}", f"{report['requests']['total']:,} requests · {report['model']}"
    )
    if report["warnings"]:
        page.add_text("\n\n".join(report["warnings"]), title="Warnings")
    page.add_facts(_facts(report))
    page.add_bars("Requests by decision", {name: float(n) for name, n in report["requests"]["decisions"].items()})
    _add_scores(page, report["scores"])
    _add_quality(page, report["quality"])
    _add_clusters(page, report["clusters"])
    _add_failures(page, report["failures"])
    _add_cost(page, report["steps"])
    return page


def _clusters(inputs: ReportInputs) -> list[dict[str, Any]]:
    """The clusters of this batch by their size in it, with examples."""
    sizes: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for entry, request in zip(inputs.assignments, inputs.table.requests, strict=True):
        if entry.cluster_id is not None:
            sizes[entry.cluster_id] += 1
            shown = examples.setdefault(entry.cluster_id, [])
            if len(shown) < N_EXAMPLES:
                shown.append(request.text[:500])
    new = {record.cluster_id for record in inputs.new_clusters}
    rows = []
    for cluster_id, size in sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0])):
        record = inputs.registry.get(cluster_id)
        row: dict[str, Any] = {
            "cluster_id": cluster_id,
            "name": record.name,
            "summary": record.summary,
            "criteria": record.criteria,
        }
        row |= {"size": size, "share": size / len(inputs.assignments), "count_all_batches": record.count}
        row |= {"status": record.status, "is_new": cluster_id in new, "aliases": record.aliases}
        rows.append({**row, "examples": examples[cluster_id]})
    return rows


def _quality(inputs: ReportInputs) -> dict[str, Any]:
    """What the model said of the sampled clusters, and their means; None where nothing was asked."""
    checks = inputs.checks
    cohesion = [check.cohesion for check in checks if check.cohesion is not None]
    separate = [check.is_separate for check in checks if check.is_separate is not None]
    n_names = sum(check.n_name_checks for check in checks)
    return {
        "n_sampled": len(checks),
        "cohesion": sum(cohesion) / len(cohesion) if cohesion else None,
        "separation": sum(separate) / len(separate) if separate else None,
        "names_true": sum(check.n_names_right for check in checks) / n_names if n_names else None,
        "n_name_checks": n_names,
        "names_distinct": not repeated_names(inputs.registry.live()),
        "repeated_names": repeated_names(inputs.registry.live()),
        "clusters": [{**asdict(check), "name": inputs.registry.get(check.cluster_id).name} for check in checks],
    }


# --- the page --------------------------------------------------------------------------------------------------------


def _facts(report: dict[str, Any]) -> dict[str, object]:
    cost = report["cost"]["cost"]
    facts: dict[str, object] = {
        "Requests": report["requests"]["total"],
        "Coverage": percent(report["coverage"] / 100),
        "Clusters used": report["n_clusters_used"],
        "New clusters": report["n_new_clusters"],
        "Quarantined": report["failures"]["quarantined"],
        "Calls": report["cost"]["calls"],
        "From the cache": report["cost"]["cached"],
        "Tokens in": report["cost"]["tokens_in"],
        "Tokens out": report["cost"]["tokens_out"],
        "Cost": "price not known" if cost is None else round(cost, 4),
    }
    odd = {"Without text": "empty", "Cut": "cut", "Repeated ids": "duplicate_request_ids"}
    return {**facts, **{title: report["requests"][key] for title, key in odd.items() if report["requests"][key]}}


def _add_scores(page: Report, scores: dict[str, Any]) -> None:
    if not scores:
        return
    titles = {
        "ours": "these clusters",
        "kmeans_same_k": "k-means, as many clusters",
        "kmeans_true_k": "k-means, true k",
    }
    names = ("ari", "nmi", "accuracy", "purity", "coverage", "n_clusters")
    columns = [Column("Clustering"), *(Column(name.upper() if len(name) == 3 else name, "number") for name in names)]
    rows = [[titles.get(key, key), *(values[name] for name in names)] for key, values in scores.items()]
    note = (
        "Against the labels of the label column. k-means on the same embeddings costs nothing: the difference is what "
        "the model adds."
    )
    page.add_table("Agreement with labels", columns, rows, note=note)


def _add_quality(page: Report, quality: dict[str, Any]) -> None:
    if not quality["n_sampled"]:
        return
    page.add_facts(
        {
            "Cohesion, 1 to 5": quality["cohesion"],
            "Apart from the nearest": percent(quality["separation"]),
            "Names chosen rightly": percent(quality["names_true"]),
            "Names distinct": "yes" if quality["names_distinct"] else "no",
        },
        notes={"Names chosen rightly": f"{quality['n_name_checks']} forced choices among five names"},
    )
    columns = [Column("Cluster"), Column("Cohesion", "number"), Column("Separate"), Column("Names right")]
    rows = [
        [
            check["name"],
            check["cohesion"],
            {True: "yes", False: "no", None: "–"}[check["is_separate"]],
            f"{check['n_names_right']} of {check['n_name_checks']}",
        ]
        for check in quality["clusters"]
    ]
    details = [[check["cohesion_reasoning"]] if check["cohesion_reasoning"] else [] for check in quality["clusters"]]
    page.add_table(
        "Sampled clusters, as the model sees them", columns, rows, details=details, details_title="Reasoning"
    )


def _add_clusters(page: Report, clusters: list[dict[str, Any]]) -> None:
    if not clusters:
        return
    columns = [Column("Name"), Column("Requests", "bar"), Column("Share", "percent"), Column("Status"), Column("Id")]
    rows = [
        [
            row["name"],
            row["size"],
            row["share"],
            f"{row['status']}{', new' if row['is_new'] else ''}",
            row["cluster_id"],
        ]
        for row in clusters
    ]
    details = [
        {
            "Summary": [text for text in (row["summary"], row["criteria"]) if text],
            "Also called": row["aliases"],
            "Requests": row["examples"],
        }
        for row in clusters
    ]
    page.add_table("Clusters", columns, rows, details=details, sort_by="Requests", descending=True)
    page.add_histogram("Cluster sizes", [float(row["size"]) for row in clusters], y_label="Clusters")


def _add_failures(page: Report, failures: dict[str, Any]) -> None:
    if failures["attempts"]:
        page.add_bars("Failed attempts by kind", {name: float(n) for name, n in failures["attempts"].items()})
    rows = [[row["request_id"], row["reason"]] for row in failures["quarantined_requests"][:N_QUARANTINED_SHOWN]]
    if rows:
        note = f"{failures['quarantined']} requests got no valid answer, {percent(failures['rate'])} of all."
        page.add_table("Quarantined requests", [Column("Request"), Column("Reason")], rows, note=note)


def _add_cost(page: Report, steps: dict[str, Any]) -> None:
    numbers = {"calls": "Calls", "cached": "From the cache", "tokens_in": "Tokens in", "tokens_out": "Tokens out"}
    columns = [Column("Step"), *(Column(title, "number") for title in numbers.values()), Column("Cost", "number", 4)]
    rows = [[name, *(step[key] for key in numbers), step["cost"]] for name, step in steps.items()]
    page.add_table("What each step took", columns, rows)

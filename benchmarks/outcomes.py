"""What a benchmark found: on the screen, and in benchmarks/results/, as numbers (.json) and as a page (.md).

page = Page("text_pipeline", "The text pipeline against its peers")
page.save("stage2", Outcome("stage 2: …", costs, [Finding.speed("whole stage", theirs, mine, at_least=10.0)]))
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

from benchmarks.machine import describe_machine, load_average, machine_lines
from benchmarks.measure import ROOT, Cost, n_threads

RESULTS = ROOT / "benchmarks" / "results"

# Peak memory may grow by so much over ten times the rows and still count as flat: allocators keep some.
FLAT_WITHIN = 1.25


@dataclass(frozen=True)
class Finding:
    """One comparison: what was measured, the target, and whether it was reached."""

    what: str
    measured: str
    target: str
    verdict: str

    @classmethod
    def speed(cls, what: str, theirs: Cost, mine: Cost, *, at_least: float | None) -> Finding:
        """How many times faster ours is, by wall clock; the ratio of processor seconds is told beside it."""
        ratio, cpu_ratio = theirs.wall_s / mine.wall_s, theirs.cpu_s / mine.cpu_s
        target = "" if at_least is None else f"{at_least:g}x or more"
        verdict = "" if at_least is None else _verdict(ratio >= at_least, f"{ratio / at_least:.2f} of it")
        return cls(f"speed: {what}", f"{ratio:.2f}x (processor seconds {cpu_ratio:.2f}x)", target, verdict)

    @classmethod
    def at_least(cls, what: str, value: float, target: float) -> Finding:
        """A value that should be large."""
        return cls(what, f"{value:.6g}", f"{target:g} or more", _verdict(value >= target, f"by {target - value:.3g}"))

    @classmethod
    def at_most(cls, what: str, value: float, target: float) -> Finding:
        """A value that should be small."""
        return cls(what, f"{value:.4g}", f"{target:g} or less", _verdict(value <= target, f"by {value - target:.3g}"))

    @classmethod
    def fact(cls, what: str, value: float) -> Finding:
        """A value without a target."""
        return cls(what, f"{value:.4g}", "", "")

    @classmethod
    def flat_memory(cls, few: Cost, many: Cost) -> Finding:
        """Peak memory over ten times the rows."""
        return cls.flat("memory at ten times the rows", few.peak_mib, many.peak_mib)

    @classmethod
    def flat(cls, what: str, few_mib: float, many_mib: float) -> Finding:
        """Memory of few and of many rows."""
        ratio = many_mib / few_mib
        verdict = _verdict(ratio <= FLAT_WITHIN, f"{ratio:.2f}x")
        return cls(what, f"{few_mib:.0f} to {many_mib:.0f} MiB", "flat", verdict)


def _verdict(is_reached: bool, shortfall: str) -> str:
    return "reached" if is_reached else f"missed, {shortfall}"


@dataclass(frozen=True)
class Outcome:
    """All of one comparison."""

    title: str
    costs: dict[str, Cost]
    findings: list[Finding]


def outcome_lines(title: str, costs: dict[str, Cost], findings: list[Finding]) -> list[str]:
    """The two tables of a comparison, as Markdown."""
    lines = [f"## {title}", "", "| side | seconds | processor seconds | peak MiB | of it libraries | runs |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, cost in costs.items():
        numbers = (f"{cost.wall_s:.2f}", f"{cost.cpu_s:.2f}", f"{cost.peak_mib:.0f}", f"{cost.set_up_mib:.0f}")
        lines.append(f"| {name} | {' | '.join(numbers)} | {cost.n_runs} |")
    lines += ["", "| what | measured | target | |", "| --- | --- | --- | --- |"]
    lines += [f"| {f.what} | {f.measured} | {f.target} | {f.verdict} |" for f in findings]
    return [*lines, ""]


def print_outcome(outcome: Outcome) -> None:
    """Print the tables of a comparison."""
    print("\n".join(outcome_lines(outcome.title, outcome.costs, outcome.findings)), flush=True)


@dataclass(frozen=True)
class Page:
    """The results of one benchmark, comparison by comparison: NAME.json and NAME.md."""

    name: str
    title: str
    notes: tuple[str, ...] = ()  # lines of Markdown at the end: what a reader has to know beside the numbers

    def save(self, part: str, outcome: Outcome) -> None:
        """Keep the numbers of one comparison, with the machine's description, and write the page again."""
        path = RESULTS / f"{self.name}.json"
        parts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        parts[part] = {
            "title": outcome.title,
            "costs": {name: {**asdict(cost), "result": {}} for name, cost in outcome.costs.items()},
            "findings": [asdict(finding) for finding in outcome.findings],
            "machine": describe_machine(),
            "load": load_average(),
            "threads": n_threads(),
            "date": date.today().isoformat(),
        }
        parts = dict(sorted(parts.items()))
        path.write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text("\n".join(self._lines(parts)), encoding="utf-8")

    def _lines(self, parts: dict[str, Any]) -> list[str]:
        lines = [f"# {self.title}", "", f"Written by `python benchmarks/{self.name}.py`.", ""]
        machine: list[str] = []
        for saved in parts.values():
            if machine_lines(saved["machine"]) != machine:
                machine = machine_lines(saved["machine"])
                lines += [f"- {line}" for line in machine] + [""]
            costs = {name: Cost(**cost) for name, cost in saved["costs"].items()}
            lines += outcome_lines(saved["title"], costs, [Finding(**finding) for finding in saved["findings"]])
            cores = saved["machine"]["cores"]
            busy = "; others used it too, so the ratio of processor seconds is the steadier one"
            note = busy if saved["load"] > 1.5 * cores else ""
            lines += [
                f"{saved['date']}, threads: {saved['threads']}, load average {saved['load']} on {cores} cores{note}.",
                "",
            ]
        return [*lines, *self.notes, ""] if self.notes else lines

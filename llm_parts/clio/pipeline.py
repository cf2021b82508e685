"""Clio from dialogues to a taxonomy: read, ask facets, embed, cluster, name, build two hierarchies, judge, report.

Every question goes through one cache and every array into `steps/`, so a run that was killed anywhere and started again
takes the same way, asks nothing twice and leaves the same files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from common.commit import write_json
from common.config import UserError, settings_to_dict
from common.progress import Progress, Stopwatch
from llm_parts.client import BaseLLMProvider, BudgetExhausted
from llm_parts.clio import outputs
from llm_parts.clio.base_names import BaseNamer, BaseNames, audit_base
from llm_parts.clio.comparison import COMPARISON_TITLE, compare_hierarchies
from llm_parts.clio.conversations import ConversationTable, load_conversations
from llm_parts.clio.facets import FacetTable, extract_facets
from llm_parts.clio.hierarchy_linkage import build_linkage_hierarchy
from llm_parts.clio.hierarchy_llm import build_llm_hierarchy
from llm_parts.clio.inspection import Inspection, Tables
from llm_parts.clio.judges import Judge
from llm_parts.clio.masking import Masker
from llm_parts.clio.models import Models, local_model
from llm_parts.clio.plan import Plan
from llm_parts.clio.privacy import Kept, add_audit, begin_audit, keep_large, why_nothing_is_shown, withhold_parents
from llm_parts.clio.run_folder import RunFolder, identity_of
from llm_parts.clio.run_tables import (
    by_language_rows,
    calls_rows,
    conversation_rows,
    facet_rows,
    without_empty,
)
from llm_parts.clio.settings import ClioSettings
from llm_parts.clio.side_by_side import compare_extractors, sweep_sampling
from llm_parts.clio.taxonomy import ClioReport, Hierarchy, base_paths, count_sizes
from llm_parts.clio.vector_steps import MODEL_NAME, SWEEP_PLOT_NAME, VectorSteps, check_vector_settings
from llm_parts.settings import LlmSettings

log = logging.getLogger(__name__)

_AUDIT_NAME = "audit.json"
_RESULTS = (_AUDIT_NAME, *outputs.FILE_NAMES, SWEEP_PLOT_NAME, MODEL_NAME)


def run_clio(
    settings: ClioSettings,
    llm: LlmSettings,
    *,
    overwrite: bool = False,
    progress: bool = True,
    provider: BaseLLMProvider | None = None,
) -> dict[str, Any]:
    """Make the taxonomy of `clio.input` in `clio.output_dir`; returns what was found, what it took and where it lies.

    `provider` is an object of one's own in the place of the one that section `llm` names. Raises UserError for wrong
    input, another configuration's output, what the provider refuses, where a budget ends, and where more dialogues are
    quarantined than `max_failure_rate` allows.
    """
    watch = Stopwatch()
    identity = identity_of(settings, llm)
    with RunFolder(settings.output_dir, identity, overwrite=overwrite, results=_RESULTS) as folder:
        finished = folder.result
        if finished is not None:
            log.info("%s is finished already, nothing to do", folder.folder)
            return {**finished, "calls": 0}
        table = load_conversations(settings)
        check_vector_settings(settings, has_labels=bool(table.labels()), llm_model=local_model(llm))
        with Models(settings, llm, folder=folder, provider=provider) as models:
            run = ClioRun(table, settings=settings, models=models, folder=folder, progress=progress)
            log.info("estimated calls: %s", run.plan["calls"])
            try:
                models.preflight()
                folder.begin()
                report, facets = run.study()
            except BudgetExhausted as exhausted:
                run.write_calls()
                raise UserError(f"{exhausted}. Left to do: {run.what_is_left()}") from None
            failures = run.failure_rate(facets)
            result = run.write(report, facets, is_done=failures <= settings.max_failure_rate)
    log.info("%s dialogues in %.1f s", f"{len(table):,}", watch.seconds)
    if failures > settings.max_failure_rate:
        raise UserError(
            f"{facets.n_quarantined} of {len(table)} dialogues ({failures:.1%}) are quarantined, more than "
            f"clio.max_failure_rate={settings.max_failure_rate:g}; {folder.folder / 'facets.parquet'} says why; mend "
            "it, set llm.retry_quarantined=true and run again"
        )
    return result


def check_clio(settings: ClioSettings, llm: LlmSettings) -> dict[str, Any]:
    """Validate the input and estimate calls, tokens and cost per step; nothing is asked and nothing is written."""
    table = load_conversations(settings)
    check_vector_settings(settings, has_labels=bool(table.labels()), llm_model=local_model(llm))
    return {
        **table.counts(),
        "provider": llm.provider,
        "model": llm.model_name,
        **Plan(table, settings=settings, llm=llm).to_dict(),
        "output_dir": settings.output_dir,
    }


class ClioRun:
    """One run over one table of conversations."""

    def __init__(
        self,
        table: ConversationTable,
        *,
        settings: ClioSettings,
        models: Models,
        folder: RunFolder,
        progress: bool,
    ) -> None:
        self.table = table
        self.settings = settings
        self.models = models
        self.folder = folder
        self.plan = Plan(table, settings=settings, llm=models.llm).to_dict()
        self._progress = progress
        self._masker = Masker(enabled=settings.mask, names=settings.mask_names)
        self._main = settings.facets[0].name
        self._labels = table.labels()
        self.vector_steps = VectorSteps(
            settings,
            folder=folder,
            seed=settings.random_state,
            true_labels=self.true_labels(),
            llm_model=local_model(models.llm),
            progress=progress,
        )
        self._tables: Tables = []
        self._warnings: list[str] = []

    def study(self) -> tuple[ClioReport, FacetTable]:
        """All steps in their order."""
        facets = self.extract()
        vectors = self.embed(facets)
        labels, centroids = self.vector_steps.cluster(vectors)
        self._tables += self.vector_steps.tables
        kept = self.keep_large(labels, centroids)
        base, audit = self.name(facets, vectors, kept, centroids)
        hierarchies, audit = self.build_hierarchies(base, audit)
        inspection = self.inspect(facets, vectors, base, hierarchies)
        self.compare(base, hierarchies, inspection)
        map_xy = self.place(vectors)
        return self.report(facets, base, hierarchies, map_xy, audit), facets

    # --- Steps -------------------------------------------------------------------------------------------------------

    def extract(self) -> FacetTable:
        """Ask the facets of every dialogue."""
        asked = sum(not conversation.is_empty for conversation in self.table.conversations)
        with Progress(asked, label="facets", unit="dialogues", enabled=self._progress) as bar:
            facets = extract_facets(
                self.table.conversations,
                client=self.models.main,
                settings=self.settings,
                on_done=lambda: bar.update(1),
            )
        self._tables += [
            ("Dialogues", conversation_rows(self.table, facets)),
            ("Facets", facet_rows(facets, least=self.settings.min_cluster_size)),
        ]
        return facets

    def embed(self, facets: FacetTable) -> np.ndarray:
        """Unit vectors [n, d] of the facets; zero for a dialogue that has none."""
        weights = {facet.name: facet.weight for facet in self.settings.facets if facet.weight > 0} | {self._main: 1.0}
        names = [self._main, *(name for name in weights if name != self._main)]
        columns = {name: [_as_text(value) for value in facets.columns[name]] for name in names}
        return self.vector_steps.embed(columns, weights=weights)

    def keep_large(self, labels: np.ndarray, centroids: np.ndarray) -> Kept:
        """The clusters that hold conversations and users enough to be shown."""
        users = [one.user_id for one in self.table.conversations] if self.table.has_users else None
        if users is None and self.settings.min_unique_users > 1:
            self._warnings.append("the input has no column user_id, so clio.min_unique_users could not be applied")
        kept = keep_large(
            labels,
            users,
            n_clusters=len(centroids),
            min_size=self.settings.min_cluster_size,
            min_users=self.settings.min_unique_users,
        )
        log.info(
            "privacy: %d clusters kept, %d too small, %d with too few users",
            len(kept.clusters),
            kept.n_small,
            kept.n_few_users,
        )
        if not len(kept.clusters):
            self._warnings.append(why_nothing_is_shown(len(centroids), algorithm=self.settings.algorithm))
        return kept

    def name(
        self, facets: FacetTable, vectors: np.ndarray, kept: Kept, centroids: np.ndarray
    ) -> tuple[BaseNames, dict[str, Any]]:
        """Name the clusters, compare ways of naming, and drop what the auditor objects to."""
        texts = self.main_texts(facets)
        questions = self.models.questions()
        namer = BaseNamer(
            texts, questions=questions, client=self.models.main, settings=self.settings, masker=self._masker
        )
        base = namer.name(vectors, kept.labels, centroids[kept.clusters])
        self._tables.append(("Names of base clusters", namer.compare_rows(base, vectors)))
        base, n_dropped, scores = audit_base(base, threshold=self.settings.audit_threshold, questions=questions)
        self._warnings += questions.warnings
        audit = begin_audit(masked=self.table.masked, kept=kept)
        return base, add_audit(audit, n_dropped, scores)

    def build_hierarchies(self, base: BaseNames, audit: dict[str, Any]) -> tuple[list[Hierarchy], dict[str, Any]]:
        """Both hierarchies over the same base clusters, cut to the same sizes and audited."""
        if base.n_clusters == 0:
            return [Hierarchy(kind, [], 0, 0.0) for kind in ("llm", "linkage")], audit
        sizes = count_sizes(base.labels, n_clusters=base.n_clusters)
        client, settings = self.models.main, self.settings
        by_llm = build_llm_hierarchy(
            base.names, sizes, client=client, settings=settings, embed=self.vector_steps.embed_texts
        )
        by_linkage = build_linkage_hierarchy(
            base.names,
            base.centroids,
            sizes,
            client=client,
            settings=settings,
            level_sizes=[len(level.names) for level in by_llm.levels],
        )
        hierarchies = []
        questions = self.models.questions()
        for hierarchy in (by_llm, by_linkage):
            self._warnings += hierarchy.warnings
            audited, n_withheld, scores = withhold_parents(
                hierarchy, base.names, threshold=settings.audit_threshold, questions=questions
            )
            hierarchies.append(audited)
            audit = add_audit(audit, n_withheld, scores)
        return hierarchies, audit

    def inspect(
        self, facets: FacetTable, vectors: np.ndarray, base: BaseNames, hierarchies: Sequence[Hierarchy]
    ) -> Inspection:
        """Let the judges see samples of everything."""
        settings = self.settings
        choices = settings.judges if settings.judge_sample else ()
        judges = [Judge(choice.label(self.models.llm), self.models.judge_questions(choice)) for choice in choices]
        inspection = Inspection(judges, settings.judge_sample, settings.random_state)
        conversations = self.table.conversations
        n_labels = len(set(self._labels) - {""}) if self._labels else None
        inspection.inspect_facets(conversations, facets)
        inspection.inspect_names(base)
        inspection.inspect_placements(conversations, base, vectors, n_labels=n_labels)
        inspection.compare_hierarchies(hierarchies[0], hierarchies[1], base)
        inspection.compare_naming(base)
        self._tables += [*inspection.tables(), *self._side_by_side(facets, base, hierarchies[0], inspection)]
        self._warnings += inspection.warnings
        for judge in judges:
            self._warnings += [f"{judge.name}: {text}" for text in judge.questions.warnings]
        return inspection

    def _side_by_side(
        self, facets: FacetTable, base: BaseNames, by_llm: Hierarchy, inspection: Inspection
    ) -> list[tuple[str, list[dict[str, Any]]]]:
        """What other models, prompts and temperatures would have made of the same data."""
        common: dict[str, Any] = {
            "settings": self.settings,
            "models": self.models,
            "embed": self.vector_steps.embed_texts,
        }
        extracted = compare_extractors(self.table.conversations, facets, inspection=inspection, **common)
        sampled = sweep_sampling(base, by_llm, true_labels=self.true_labels(), **common)
        return [("Extraction by several models", extracted), ("Temperature and top_p", sampled)]

    def compare(self, base: BaseNames, hierarchies: Sequence[Hierarchy], inspection: Inspection) -> None:
        """The hierarchies side by side, and how well each language fares."""
        rows = compare_hierarchies(
            hierarchies,
            base_labels=base.labels,
            true_labels=self.true_labels(),
            centroids=base.centroids,
            votes=inspection.votes,
        )
        top = base_paths(hierarchies[0], n_base=base.n_clusters)[0]
        by_language = by_language_rows(self.table, base.labels, top, self.true_labels())
        self._tables += [(COMPARISON_TITLE, rows), ("Languages", by_language)]

    def place(self, vectors: np.ndarray) -> np.ndarray:
        """Places on the map [n, 2]."""
        from llm_parts.clio.map2d import place_on_map

        return self.folder.arrays(
            "map", lambda: {"xy": place_on_map(vectors, seed=self.settings.random_state)}, made_from=[vectors]
        )["xy"]

    # --- The result --------------------------------------------------------------------------------------------------

    def report(
        self,
        facets: FacetTable,
        base: BaseNames,
        hierarchies: list[Hierarchy],
        map_xy: np.ndarray,
        audit: dict[str, Any],
    ) -> ClioReport:
        """Everything that is shown."""
        texts = self.main_texts(facets)
        conversations = self.table.conversations
        if self.settings.show_conversations:
            hover = [f"{text}\n\n{one.to_text()}" for text, one in zip(texts, conversations, strict=True)]
        else:
            hover = texts
        warnings = list(dict.fromkeys(self._warnings))
        for warning in warnings:
            log.warning("%s", warning)
        tables = [*self._tables, ("Questions asked", calls_rows(self.plan, self.models.ledger()))]
        if warnings:
            tables.insert(0, ("Warnings", [{"warning": warning} for warning in warnings]))
        return ClioReport(
            conversation_ids=[one.conversation_id for one in conversations],
            base_labels=base.labels,
            base_names=base.names,
            hierarchies=hierarchies,
            map_xy=map_xy,
            hover=hover,
            facets={**facets.columns, "error": facets.errors},
            tables=without_empty(tables),
            audit=audit,
            show_outsiders=self.settings.show_conversations,
        )

    def write(self, report: ClioReport, facets: FacetTable, *, is_done: bool) -> dict[str, Any]:
        """Write all files and mark the run as done; one with too many failures stays open, to be run again."""
        write_json(self.folder.folder / _AUDIT_NAME, report.audit)
        outputs.write_clio_outputs(report, self.folder.folder)
        names = [_AUDIT_NAME, *outputs.FILE_NAMES, *self.vector_steps.files]
        sizes = count_sizes(report.base_labels, n_clusters=len(report.base_names))
        result = {
            "conversations": len(self.table),
            "in_clusters": int(sizes.sum()),
            "base_clusters": len(report.base_names),
            "top_clusters": {one.kind: len(one.levels[0].names) if one.levels else 0 for one in report.hierarchies},
            "quarantined": facets.n_quarantined,
            "taxonomy": str(self.folder.folder / outputs.TAXONOMY_NAME),
            "report": str(self.folder.folder / outputs.REPORT_NAME),
        }
        if is_done:
            self.folder.commit(result, files=names, config=settings_to_dict(self.settings))
        return {**result, **self.write_calls()}

    def write_calls(self) -> dict[str, Any]:
        """Write down what was estimated and what this run asked and paid; returns the totals."""
        steps = self.models.ledger()
        costs = [counts["cost"] for counts in steps.values()]
        totals = {
            "calls": sum(counts["calls"] for counts in steps.values()),
            "from_cache": sum(counts["cached"] for counts in steps.values()),
            "cost": None if None in costs else sum(costs),
        }
        write_json(self.folder.calls_path, {"estimated": self.plan, "this_run": {**totals, "steps": steps}})
        log.info("calls: %s", {step: counts["calls"] for step, counts in steps.items()})
        return totals

    def what_is_left(self) -> str:
        """The calls of each step that are still to be made, as far as the estimate knows them."""
        steps = self.models.ledger()
        done = {step: counts["answered"] + counts["cached"] for step, counts in steps.items()}
        left = {step: n - done.get(step, 0) for step, n in self.plan["calls"].items()}
        return ", ".join(f"{step} {n}" for step, n in left.items() if n > 0) or "less than one call of each step"

    def failure_rate(self, facets: FacetTable) -> float:
        """The share of dialogues that are quarantined."""
        return facets.n_quarantined / max(1, len(self.table))

    # --- Texts and labels --------------------------------------------------------------------------------------------

    def main_texts(self, facets: FacetTable) -> list[str]:
        """The first facet of every dialogue; empty where there is none."""
        return [_as_text(value) for value in facets.columns[self._main]]

    def true_labels(self) -> list[str | None] | None:
        """The labels of the input, None where a row has none; None where there are none at all."""
        return [label or None for label in self._labels] if self._labels else None


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)

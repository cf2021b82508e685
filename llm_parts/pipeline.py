"""The library: `ClusteringPipeline` with fit, fit_partial and refit over data frames.

from llm_cluster import ClusteringPipeline, Settings

pipeline = ClusteringPipeline(settings=Settings(default_llm_provider="ollama"), registry_path="clusters.json")
result = pipeline.fit(df, text_column="text")
result.assignments     # request_id, cluster_id, name, confidence, rationale, decision, batch, batch_number
pipeline.get_clusters()
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.commit import OutputLock
from common.config import UserError
from llm_parts.client import LlmClient
from llm_parts.clusterer import Clusterer
from llm_parts.judge import Judge
from llm_parts.options import ClusterOptions
from llm_parts.proposer import Proposer
from llm_parts.registry import ClusterRecord, ClusterRegistry
from llm_parts.registry_file import RegistryFile
from llm_parts.requests import Request, RequestTable, read_requests
from llm_parts.results import Assignment, ClusteringResult, PartialResult, coverage_of, to_frame
from llm_parts.settings import LlmSettings, Settings
from llm_parts.shortlist import Embedder, TextVectors, make_embedder
from llm_parts.wires.base import BaseLLMProvider

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


@dataclass
class _Run:
    """One call of fit, fit_partial or refit while it is under way."""

    clusterer: Clusterer
    client: LlmClient
    table: RequestTable
    batch_id: str
    index: pd.Index


class ClusteringPipeline:
    """Clusters requests with an LLM and keeps the registry of clusters between calls.

    `llm_provider` is an object of one's own (a subclass of BaseLLMProvider), the name of a provider, or None for the
    one that `settings` name. With `registry_path` the registry is read from that file and written back after every
    batch; a second run on the same file raises LockHeld. `judge`, `proposer` and `embedder` replace the built-in ones.
    """

    def __init__(
        self,
        llm_provider: BaseLLMProvider | str | None = None,
        settings: Settings | None = None,
        business_context: str | None = None,
        registry_path: str | Path | None = None,
        *,
        judge: Judge | type[Judge] | None = None,
        proposer: Proposer | type[Proposer] | None = None,
        embedder: Embedder | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self._provider = None if isinstance(llm_provider, str) else llm_provider
        self._llm = self.settings.llm_settings(llm_provider if isinstance(llm_provider, str) else None)
        self._options = options_of(self.settings, business_context)
        self._judge = judge() if isinstance(judge, type) else judge
        self._proposer = proposer() if isinstance(proposer, type) else proposer
        self._vectors = TextVectors(embedder or make_embedder(self._options.embedder))
        path = registry_path or self.settings.registry_path
        self._file = RegistryFile(path) if path else None
        self._read_fingerprint = ""
        self.registry = ClusterRegistry()
        if self._file is not None:
            self._read_registry(self._file)

    def fit(
        self,
        df: pd.DataFrame,
        text_column: str = "text",
        limit: int | None = None,
        *,
        batch_id: str | None = None,
        context_columns: Sequence[str] = (),
    ) -> ClusteringResult:
        """Cluster all rows, or the first `limit`; results are in the order of the rows.

        Raises UserError for a column that is not there, for what the provider refuses, and where a budget ends
        (BudgetExhausted; what was answered is in the cache, if there is one).
        """
        rows = df.head(limit) if limit is not None else df
        return self._fit(rows, text_column, batch_id=batch_id, context_columns=context_columns, previous=None)

    def refit(
        self,
        df: pd.DataFrame,
        previous_assignments: Any,
        text_column: str = "text",
        *,
        batch_id: str | None = None,
        context_columns: Sequence[str] = (),
    ) -> ClusteringResult:
        """Cluster rows of which some were assigned before: those stay where they were, the others are judged.

        `previous_assignments` is a ClusteringResult, its `assignments`, or a mapping from request_id to cluster_id.
        What is elsewhere now (its cluster was merged, or is not known any more) is logged and listed in `changes`.
        Rows without a `request_id` are those of the same place in the previous result.
        """
        previous = previous_of(previous_assignments)
        if batch_id is None and "request_id" not in df.columns:
            batch_id = batch_of(previous_assignments)
        return self._fit(df, text_column, batch_id=batch_id, context_columns=context_columns, previous=previous)

    def fit_partial(
        self,
        df: pd.DataFrame,
        batch_size: int | None = None,
        start_from: int = 0,
        *,
        text_column: str = "text",
        batch_id: str | None = None,
        context_columns: Sequence[str] = (),
    ) -> Iterator[PartialResult]:
        """Cluster batch by batch, yielding each; may be stopped after any, and continued with `start_from`.

        A batch brings along, as `revised`, what changed in earlier ones: rare requests that found a cluster and
        clusters that were merged.
        """
        if start_from and batch_id is None and self.registry.batches:
            batch_id = self.registry.batches[-1].batch_id
        size = batch_size or self._options.batch_size
        with self._running(df, text_column, batch_id, context_columns, None, start_from, size) as run:
            remaining = run.table.requests[start_from:]
            for number, batch in numbered_batches(remaining, size, first_row=start_from):
                known = {record.cluster_id for record in run.clusterer.new_clusters()}
                run.clusterer.process(batch, batch_number=number)
                if batch[-1].position == len(run.table.requests) - 1:
                    run.clusterer.finish()
                changed = run.clusterer.take_changes()
                first = batch[0].position
                self._commit(run)
                yield PartialResult(
                    batch_number=number,
                    batch_id=run.batch_id,
                    assignments=self._frame(run, [entry for entry in changed if entry.position >= first]),
                    new_clusters=[r for r in run.clusterer.new_clusters() if r.cluster_id not in known],
                    processed_rows=batch[-1].position + 1,
                    total_rows=len(df),
                    revised=self._frame(run, [entry for entry in changed if entry.position < first]),
                )

    def get_clusters(self) -> list[ClusterRecord]:
        """All clusters that requests can be in, the most frequent first."""
        return self.registry.by_frequency()

    def save_clusters(self, path: str | Path) -> None:
        """Write the registry to a file; a registry that was there becomes the previous generation."""
        with OutputLock(path):
            RegistryFile(path).save(self.registry)

    def load_clusters(self, path: str | Path) -> None:
        """Go on with the registry of a file, in place of the present one; raises UserError where it is none."""
        if not Path(path).exists():
            raise UserError(f"registry {path} does not exist; save_clusters writes one")
        self.registry = RegistryFile(path).load()
        if self._file is not None:
            with OutputLock(self._file.path):
                self._write_registry(self._file)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _fit(
        self,
        df: pd.DataFrame,
        text_column: str,
        *,
        batch_id: str | None,
        context_columns: Sequence[str],
        previous: Mapping[str, str | None] | None,
    ) -> ClusteringResult:
        size = self._options.batch_size
        with self._running(df, text_column, batch_id, context_columns, previous, 0, size) as run:
            for _ in run.clusterer.process_all(numbered_batches(run.table.requests, size)):
                pass
            run.clusterer.finish()
            self._commit(run)
            return self._result(run)

    @contextmanager
    def _running(
        self,
        df: pd.DataFrame,
        text_column: str,
        batch_id: str | None,
        context_columns: Sequence[str],
        previous: Mapping[str, str | None] | None,
        start_from: int,
        batch_size: int,
    ) -> Iterator[_Run]:
        """Hold the registry and a client for one run."""
        with OutputLock(self._file.path) if self._file is not None else nullcontext():
            if self._file is not None and self._file.fingerprint() != self._read_fingerprint:
                self._read_registry(self._file)
            batch_id = batch_id or self.registry.next_batch_id()
            table = read_requests(
                {str(name): df[name].tolist() for name in df.columns},
                text_column=text_column,
                batch_id=batch_id,
                max_chars=self._options.max_request_chars,
                context_columns=context_columns,
                where="the data frame",
            )
            # A run works on a copy, so that one that fails leaves the registry as it was.
            registry = self.registry.copy()
            is_repeated = any(entry.batch_id == batch_id for entry in registry.batches)
            if start_from == 0:
                registry.begin_batch(batch_id)
            with LlmClient(self._llm, provider=self._provider) as client:
                clusterer = Clusterer(
                    client,
                    registry,
                    options=self._options.model_copy(update={"batch_size": batch_size}),
                    vectors=self._vectors,
                    batch_id=batch_id,
                    judge=self._judge,
                    proposer=self._proposer,
                    previous=previous,
                    count_kept=is_repeated,
                )
                client.open()
                clusterer.get_ready(table.requests[start_from:])
                yield _Run(clusterer, client, table, batch_id, df.index)

    def _commit(self, run: _Run) -> None:
        """Take over the registry of a run, in memory and on the disk."""
        assignments = run.clusterer.assignments.values()
        n_assigned = sum(entry.cluster_id is not None for entry in assignments)
        run.clusterer.registry.note_batch(run.batch_id, n_requests=len(assignments), n_assigned=n_assigned)
        self.registry = run.clusterer.registry.copy()
        if self._file is not None:
            self._write_registry(self._file)

    def _result(self, run: _Run) -> ClusteringResult:
        assignments = [run.clusterer.assignments[request.position] for request in run.table.requests]
        n_assigned = sum(entry.cluster_id is not None for entry in assignments)
        n_quarantined = sum(entry.decision == "quarantined" for entry in assignments)
        coverage = coverage_of(assignments)
        if n_quarantined > self.settings.max_failure_rate * len(assignments):
            log.warning("%d of %d requests are quarantined, the model failed on them", n_quarantined, len(assignments))
        metrics = {
            "batch_id": run.batch_id,
            "total_requests": len(assignments),
            "assigned_requests": n_assigned,
            "coverage_pct": round(coverage, 2),
            "quarantined_requests": n_quarantined,
            "empty_requests": run.table.n_empty,
            "cut_requests": run.table.n_cut,
            "duplicate_request_ids": run.table.n_duplicate_ids,
            **run.clusterer.metrics(),
            "llm": run.client.ledger.summary(),
        }
        return ClusteringResult(
            batch_id=run.batch_id,
            assignments=self._frame(run, assignments),
            clusters=self.registry.by_frequency(),
            coverage=coverage,
            metrics=metrics,
            total_requests=len(assignments),
            assigned_requests=n_assigned,
            changes=list(run.clusterer.changes),
        )

    def _frame(self, run: _Run, assignments: Sequence[Assignment]) -> pd.DataFrame:
        index = run.index[[entry.position for entry in assignments]]
        return to_frame(assignments, run.clusterer.registry, batch_id=run.batch_id, index=index)

    def _read_registry(self, file: RegistryFile) -> None:
        self.registry = file.load()
        self._read_fingerprint = file.fingerprint()

    def _write_registry(self, file: RegistryFile) -> None:
        file.save(self.registry)
        self._read_fingerprint = file.fingerprint()


def numbered_batches(
    requests: Sequence[Request], batch_size: int, *, first_row: int = 0
) -> Iterator[tuple[int, Sequence[Request]]]:
    """Cut requests into batches, each with its number within the whole input, from 1."""
    for start in range(0, len(requests), batch_size):
        yield (first_row + start) // batch_size + 1, requests[start : start + batch_size]


def options_of(settings: Settings, business_context: str | None = None) -> ClusterOptions:
    """The clustering knobs that library settings amount to."""
    return ClusterOptions(
        batch_size=settings.clustering_batch_size,
        judge_batch_size=settings.judge_batch_size,
        shortlist=settings.judge_shortlist,
        max_clusters_per_batch=settings.max_clusters_per_batch,
        business_context=business_context if business_context is not None else settings.business_context,
        language=settings.output_language or "auto",
    )


def previous_of(previous: Any) -> dict[str, str | None]:
    """request_id -> cluster_id of a result, its data frame, a list of assignments or a mapping; None: not assigned."""
    if isinstance(previous, ClusteringResult):
        previous = previous.assignments
    if isinstance(previous, Mapping):
        pairs: Any = previous.items()
    elif hasattr(previous, "columns"):
        missing = {"request_id", "cluster_id"} - set(previous.columns)
        if missing:
            raise UserError(f"previous_assignments has no column {sorted(missing)}; give the assignments of a result")
        pairs = zip(previous["request_id"], previous["cluster_id"], strict=True)
    else:
        pairs = ((entry.request_id, entry.cluster_id) for entry in previous)
    return {str(key): str(value) if isinstance(value, str) else None for key, value in pairs}


def batch_of(previous: Any) -> str | None:
    """The batch that a previous result is of; None where it does not say, or is of several."""
    if isinstance(previous, ClusteringResult):
        return previous.batch_id
    batches = set(previous["batch"]) if hasattr(previous, "columns") and "batch" in previous.columns else set()
    return str(batches.pop()) if len(batches) == 1 else None


__all__ = ["ClusteringPipeline", "LlmSettings", "Settings"]

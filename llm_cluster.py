"""Cluster texts with an LLM: requests into a registry of named clusters, or dialogues into a taxonomy (mode `clio`).

Reads a table of requests (CSV, JSON lines or parquet, also zipped) and the registry of earlier batches. Writes, under
`llm_cluster.output_dir`: results (parquet, CSV), a quality report (JSON, HTML), prompts and answers, clusters.json.

    python llm_cluster.py --config clustering.example.yaml --input requests.csv --text-column message --batch-id monday

Mode `clio` reads dialogues ({messages: [{role, content}]}) and writes, under `clio.output_dir`: taxonomy.json,
clusters.parquet, facets.parquet, hierarchy_comparison.csv, map.png, report.html, audit.json; see docs/clio.md.

    python llm_cluster.py --config clustering.example.yaml --input dialogues.jsonl llm_cluster.mode=clio

As a library: from llm_cluster import ClusteringPipeline, Settings; see docs/llm_cluster.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from common import cli
from common.commit import Identity, OutputLock
from common.config import ConfigError, StageSettings, UserError, settings_to_dict
from llm_parts.batch_output import BatchOutput
from llm_parts.client import BudgetExhausted, LlmClient, get_llm_provider
from llm_parts.clio.settings import ClioSettings
from llm_parts.clusterer import Clusterer
from llm_parts.judge import Judge
from llm_parts.options import ClusterOptions
from llm_parts.pipeline import ClusteringPipeline, numbered_batches
from llm_parts.prompts import PromptContext
from llm_parts.proposer import Proposer
from llm_parts.registry import ClusterRecord, ClusterRegistry
from llm_parts.requests import RequestTable, read_requests
from llm_parts.results import RESULT_COLUMNS, ClusteringResult, PartialResult, to_rows
from llm_parts.settings import LlmSettings, Settings
from llm_parts.wires import PROVIDERS
from llm_parts.wires.base import BaseLLMProvider

log = logging.getLogger(__name__)

__all__ = [
    "PROVIDERS",
    "BaseLLMProvider",
    "BudgetExhausted",
    "ClusterRecord",
    "ClusterRegistry",
    "ClusteringPipeline",
    "ClusteringResult",
    "Judge",
    "LlmClusterSettings",
    "LlmSettings",
    "PartialResult",
    "Proposer",
    "Settings",
    "UserError",
    "check",
    "get_llm_provider",
    "main",
    "run",
]

# Keys of `llm` that change answers; the others say where, how fast and at what price.
ANSWER_KEYS = ("provider", "model", "temperature", "top_p", "seed", "max_answer_tokens", "think")


class LlmClusterSettings(ClusterOptions, StageSettings):
    """Section `llm_cluster`, with the sections `llm` and `clio` beside it."""

    shared_sections: ClassVar[tuple[str, ...]] = ("engine", "llm", "clio")

    mode: Literal["requests", "clio"] = Field(
        "requests", description="requests: clusters with a registry; clio: taxonomy"
    )
    input: str | None = Field(
        None, min_length=1, description="requests: file, folder or glob of CSV, JSON lines, parquet"
    )
    text_column: str = Field("text", min_length=1, description="column of the request's text")
    label_column: str | None = Field(None, description="column of true labels, for the report only; null: none")
    context_columns: tuple[str, ...] = Field((), description="columns that the model sees beside the text")
    output_dir: str = Field("runs/llm_cluster", min_length=1, description="folder of everything that is written")
    batch_id: str = Field(
        "batch-001", pattern=r"^[\w.-]{1,100}$", description="name of this batch, in ids and file names"
    )
    limit: int | None = Field(None, ge=1, description="cluster the first so many rows; null: all")
    registry_path: str | None = Field(None, description="registry of clusters; null: clusters.json in output_dir")
    max_failure_rate: float = Field(0.05, ge=0, le=1, description="share of quarantined requests above which exit is 1")
    log_prompts: bool = Field(True, description="write every prompt and answer to prompts/")
    llm: LlmSettings = LlmSettings()
    clio: ClioSettings = ClioSettings()

    @field_validator("batch_id")
    @classmethod
    def _no_hidden_file(cls, value: str) -> str:
        if value.startswith("."):
            raise ValueError("should not begin with a dot")
        return value

    @property
    def input_path(self) -> str:
        """The input, which only mode `requests` demands; raises ConfigError where it is not set."""
        if self.input is None:
            raise ConfigError("llm_cluster.input: required, but missing; give --input FILE")
        return self.input


def run(settings: LlmClusterSettings, *, overwrite: bool = False) -> dict[str, Any]:
    """Cluster one batch of requests; returns what was found and where it lies.

    Raises UserError for wrong input, for what the provider refuses, where a budget ends, and where more requests are
    quarantined than `max_failure_rate` allows.
    """
    if settings.mode == "clio":
        from llm_parts.clio.pipeline import run_clio

        return run_clio(settings.clio, settings.llm, overwrite=overwrite, progress=settings.progress)
    watch = cli.Stopwatch()
    output = BatchOutput(settings.output_dir, batch_id=settings.batch_id, registry_path=settings.registry_path)
    identity = identity_of(settings)
    with ExitStack() as stack:
        stack.enter_context(OutputLock(output.folder))
        stack.enter_context(OutputLock(output.registry_file.path))
        finished = None if overwrite else output.finished(identity)
        if finished is not None:
            log.info("batch %s is done already, nothing to do", settings.batch_id)
            return finished
        table = read_input(settings)
        registry = output.begin(identity, overwrite=overwrite)
        output.write_requests(table)
        registry.begin_batch(settings.batch_id)
        client = stack.enter_context(open_client(settings, output))
        clusterer = _make_clusterer(settings, client, registry)
        client.open()
        clusterer.get_ready(table.requests)
        client.preflight()
        _cluster(clusterer, table, settings)
        report = _write_outputs(settings, output, table, clusterer, client)
        result = _summary(settings, output, report)
        failure_rate = report["failures"]["rate"]
        output.commit(registry, result=result, is_done=failure_rate <= settings.max_failure_rate)
    log.info("%s requests in %.1f s", f"{len(table.requests):,}", watch.seconds)
    if failure_rate > settings.max_failure_rate:
        raise UserError(
            f"{report['failures']['quarantined']} of {len(table.requests)} requests ({failure_rate:.1%}) are "
            f"quarantined, more than llm_cluster.max_failure_rate={settings.max_failure_rate:g}; "
            f"{output.html_path} says why; mend it, set llm.retry_quarantined=true and run again"
        )
    return result


def check(settings: LlmClusterSettings) -> dict[str, Any]:
    """Validate the input and estimate calls, tokens and cost per step; nothing is asked and nothing is written."""
    from llm_parts.plan import Plan

    if settings.mode == "clio":
        from llm_parts.clio.pipeline import check_clio

        return check_clio(settings.clio, settings.llm)
    output = BatchOutput(settings.output_dir, batch_id=settings.batch_id, registry_path=settings.registry_path)
    table = read_input(settings)
    registry = output.registry_file.load()
    with LlmClient(settings.llm) as client:
        plan = Plan(client, table.requests, registry, options=settings).to_dict()
    return {
        "batch_id": settings.batch_id,
        "rows": len(table.requests),
        "empty": table.n_empty,
        "cut": table.n_cut,
        "known_clusters": len(registry.live()),
        "provider": settings.llm.provider,
        "model": settings.llm.model_name,
        **plan,
        "output_dir": settings.output_dir,
    }


def identity_of(settings: LlmClusterSettings) -> Identity:
    """What the result of this batch depends on, the registry aside."""
    from common.tables import fingerprint_input

    names = [*ClusterOptions.model_fields, "text_column", "label_column", "context_columns", "limit", "batch_id"]
    values = settings_to_dict(settings)
    keys = {name: values[name] for name in names}
    keys |= {f"llm.{name}": values["llm"][name] for name in ANSWER_KEYS}
    return Identity("llm_cluster", keys, {settings.input_path: fingerprint_input(settings.input_path)})


def read_input(settings: LlmClusterSettings) -> RequestTable:
    """Read the requests of the input."""
    from common.tables import open_table

    with tempfile.TemporaryDirectory(prefix="llm_cluster-") as folder:
        opened = open_table(settings.input_path, copy_folder=Path(folder))
        keys = {settings.text_column: "text_column", **dict.fromkeys(settings.context_columns, "context_columns")}
        if settings.label_column is not None:
            keys.setdefault(settings.label_column, "label_column")
        names = list(keys)
        opened.require_columns(*names, keys=[f"llm_cluster.{key}" for key in keys.values()])
        if "request_id" in opened.schema.names:
            names = list(dict.fromkeys(["request_id", *names]))
        stop = opened.n_rows if settings.limit is None else min(settings.limit, opened.n_rows)
        columns = opened.read_rows(0, stop, names).to_pydict()
    table = read_requests(
        columns,
        text_column=settings.text_column,
        batch_id=settings.batch_id,
        max_chars=settings.max_request_chars,
        context_columns=settings.context_columns,
        label_column=settings.label_column,
        where=settings.input_path,
    )
    odd = (table.n_empty, table.n_cut, table.n_duplicate_ids)
    log.info("read %s requests: %d without text, %d cut, %d repeated ids", f"{len(table.requests):,}", *odd)
    return table


def open_client(settings: LlmClusterSettings, output: BatchOutput) -> LlmClient:
    """The client of this batch, its cache and its prompt log under the output folder."""
    prompts_path = output.prompts_path if settings.log_prompts else None
    return LlmClient(settings.llm, prompts_path=prompts_path, default_cache_path=output.cache_path)


def _make_clusterer(settings: LlmClusterSettings, client: LlmClient, registry: ClusterRegistry) -> Clusterer:
    from llm_parts.shortlist import TextVectors, make_embedder

    vectors = TextVectors(make_embedder(settings.embedder))
    return Clusterer(client, registry, options=settings, vectors=vectors, batch_id=settings.batch_id)


def _cluster(clusterer: Clusterer, table: RequestTable, settings: LlmClusterSettings) -> None:
    n_all, n_done = len(table.requests), 0
    try:
        with cli.Progress(n_all, label="cluster", unit="requests", enabled=settings.progress) as progress:
            for n_rows in clusterer.process_all(numbered_batches(table.requests, settings.batch_size)):
                n_done += n_rows
                progress.update(n_rows)
            clusterer.finish()
    except BudgetExhausted as exhausted:
        raise UserError(f"{exhausted}. {n_done} of {n_all} requests are done, {n_all - n_done} are left") from None


def _write_outputs(
    settings: LlmClusterSettings, output: BatchOutput, table: RequestTable, clusterer: Clusterer, client: LlmClient
) -> dict[str, Any]:
    from llm_parts.baseline import compare_with_baseline
    from llm_parts.checks import QualityChecker
    from llm_parts.report import ReportInputs, build_report, write_report

    registry = clusterer.registry
    assignments = [clusterer.assignments[request.position] for request in table.requests]
    n_assigned = sum(entry.cluster_id is not None for entry in assignments)
    registry.note_batch(settings.batch_id, n_requests=len(assignments), n_assigned=n_assigned)
    context = PromptContext(settings.business_context, settings.language)
    checker = QualityChecker(client, clusterer.vectors, context=context)
    checks = checker.check(registry.live(), assignments, table.requests, n_sampled=settings.qa_sample)
    report = build_report(
        ReportInputs(
            batch_id=settings.batch_id,
            table=table,
            assignments=assignments,
            registry=registry,
            new_clusters=clusterer.new_clusters(),
            counts=clusterer.metrics(),
            checks=checks,
            scores=compare_with_baseline(assignments, table.requests, clusterer.vectors),
            ledger=client.ledger.summary(),
            model=" ".join(dict.fromkeys([settings.llm.provider, settings.llm.model_name])),
            max_failure_rate=settings.max_failure_rate,
            warnings=[output.warning] if output.warning else [],
        )
    )
    output.write_results(to_rows(assignments, registry, batch_id=settings.batch_id), RESULT_COLUMNS)
    write_report(report, json_path=output.report_path, html_path=output.html_path)
    return report


def _summary(settings: LlmClusterSettings, output: BatchOutput, report: dict[str, Any]) -> dict[str, Any]:
    return {
        "batch_id": settings.batch_id,
        "requests": report["requests"]["total"],
        "coverage": report["coverage"],
        "clusters": report["n_clusters"],
        "new_clusters": report["n_new_clusters"],
        "quarantined": report["failures"]["quarantined"],
        "calls": report["cost"]["calls"],
        "cost": report["cost"]["cost"],
        "results": str(output.results_path),
        "report": str(output.html_path),
        "registry": str(output.registry_file.path),
    }


# --- the command line ------------------------------------------------------------------------------------------------

_SHORTHANDS = {
    "--input": ("llm_cluster.input", "clio.input"),
    "--text-column": ("llm_cluster.text_column", "clio.text_column"),
    "--batch-id": ("llm_cluster.batch_id",),
    "--limit": ("llm_cluster.limit", "clio.limit"),
}


class _Shorthand(argparse.Action):
    """A flag that sets keys of several sections, whichever the mode reads."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None) or []
        keys = _SHORTHANDS[self.option_strings[0]]
        setattr(namespace, self.dest, [*before, *(f"{key}={json.dumps(values)}" for key in keys)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shorthands for keys of `llm_cluster` and `clio`, and --dry-run for --check."""
    for flag, keys in _SHORTHANDS.items():
        parser.add_argument(
            flag,
            dest="overrides",
            action=_Shorthand,
            metavar="VALUE",
            help=f"the same as {' and '.join(f'{key}=VALUE' for key in keys)}",
        )
    parser.add_argument(
        "--dry-run", dest="check", action="store_true", help="print calls, tokens and cost; the same as --check"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command `llm-clustering`: the script, and without --config the settings of the environment and `.env`."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        from_environment = [] if any(word.startswith("--co") for word in given) else environment_overrides()
    except UserError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return problem.exit_code
    return cli.main(
        LlmClusterSettings,
        run,
        doc=__doc__,
        section="llm_cluster",
        check=check,
        add_arguments=add_arguments,
        default_config=str(Path(__file__).with_name("llm_parts") / "command.yaml"),
        argv=[*from_environment, *given],
    )


def environment_overrides() -> list[str]:
    """`section.key=value` of what Settings() reads from the environment and `.env`; no secret is among them."""
    from llm_parts.pipeline import options_of

    settings = Settings()
    llm = settings.llm_settings().model_dump(mode="json", exclude_unset=True)
    options = options_of(settings).model_dump(mode="json", exclude_unset=True)
    options |= {"registry_path": settings.registry_path, "max_failure_rate": settings.max_failure_rate}
    sections: dict[str, dict[str, Any]] = {"llm": llm, "llm_cluster": options}
    return [f"{name}.{key}={json.dumps(value)}" for name, values in sections.items() for key, value in values.items()]


if __name__ == "__main__":
    from llm_cluster import main as command  # by name, so that settings and errors are those of the module

    sys.exit(command())

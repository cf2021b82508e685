"""What one batch leaves on the disk, and how a run finds out what an earlier one has left.

    clusters.json            the registry (a copy of it where registry_path is elsewhere)
    batches/ID.parquet       the requests as they were read: ids, texts cut to length, labels
    batches/ID.json          the state: what the batch was made from, and whether it is done
    results/ID.parquet, .csv one row per request
    prompts/ID.jsonl         every prompt and answer
    reports/ID.json, .html   the quality report
    cache.sqlite             answers; with it a run that was killed pays nothing twice

The state is the commit. While it says `running`, a run starts from the registry that is kept in it, so that a run that
was killed anywhere and started again takes the same way, with answers from the cache. Only a batch that is done has
changed the registry.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.commit import Identity, describe_changes, make_folder, remove_stale_temporaries, write_bytes, write_json
from common.config import UserError
from llm_parts.registry import ClusterRegistry
from llm_parts.registry_file import RegistryFile, fingerprint_bytes, parse_registry, render_registry
from llm_parts.requests import RequestTable

FOLDERS = ("batches", "results", "prompts", "reports")


class BatchOutput:
    """The files of one batch under `output_dir`; the caller holds the locks."""

    def __init__(self, output_dir: str | Path, *, batch_id: str, registry_path: str | Path | None) -> None:
        self.folder = Path(output_dir)
        self.batch_id = batch_id
        self.clusters_path = self.folder / "clusters.json"
        self.registry_file = RegistryFile(registry_path or self.clusters_path)
        self.state_path = self.folder / "batches" / f"{batch_id}.json"
        self.requests_path = self.folder / "batches" / f"{batch_id}.parquet"
        self.results_path = self.folder / "results" / f"{batch_id}.parquet"
        self.csv_path = self.folder / "results" / f"{batch_id}.csv"
        self.prompts_path = self.folder / "prompts" / f"{batch_id}.jsonl"
        self.report_path = self.folder / "reports" / f"{batch_id}.json"
        self.html_path = self.folder / "reports" / f"{batch_id}.html"
        self.cache_path = self.folder / "cache.sqlite"
        self.warning = ""  # what was wrong with the registry at the start

    def finished(self, identity: Identity) -> dict[str, Any] | None:
        """The result of this batch if it is done already, made from the same things; None where there is work left.

        Raises UserError where the batch was made, or begun, from other things.
        """
        state = self._read_state()
        if state is None:
            return None
        if state["identity"] != identity.to_dict():
            changes = describe_changes(state["identity"], identity.to_dict())
            raise UserError(
                f"batch {self.batch_id} in {self.folder} was made from other things ({changes}); "
                f"give another batch_id, or replace it with --overwrite"
            )
        return dict(state["result"]) if state["status"] == "done" else None

    def begin(self, identity: Identity, *, overwrite: bool) -> ClusterRegistry:
        """The registry to start from; a batch that was begun before starts from the same one again."""
        for name in FOLDERS:
            make_folder(self.folder / name)
            remove_stale_temporaries(self.folder / name)
        state = None if overwrite else self._read_state()
        if state is not None:
            return self._resume(state)
        if overwrite:
            self.prompts_path.unlink(missing_ok=True)
        registry = self.registry_file.load()
        self.warning = self.registry_file.warning
        state = {
            "status": "running",
            "identity": identity.to_dict(),
            "registry_before": self.registry_file.fingerprint(),
            "registry_after": [],
            "warning": self.warning,
            "registry": json.loads(render_registry(registry)),
        }
        write_json(self.state_path, state)
        return registry

    def write_requests(self, table: RequestTable) -> None:
        """Write down what was read."""
        rows = [
            {
                "request_id": request.request_id,
                "text": request.text,
                "label": request.label,
                "characters_left_out": request.n_left_out,
            }
            for request in table.requests
        ]
        write_bytes(self.requests_path, _parquet(rows, ["request_id", "text", "label", "characters_left_out"]))

    def write_results(self, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
        """Write one row per request, as parquet and as CSV."""
        import pandas as pd

        write_bytes(self.results_path, _parquet(rows, columns))
        text = pd.DataFrame(rows, columns=list(columns)).to_csv(index=False)
        write_bytes(self.csv_path, text.encode("utf-8"))

    def commit(self, registry: ClusterRegistry, *, result: dict[str, Any], is_done: bool) -> None:
        """Save the registry and mark the batch as done; one with too many failures stays open, to be run again."""
        state = self._read_state()
        if state is None:
            raise ValueError("commit before begin")
        content = render_registry(registry)
        # The fingerprint goes first: killed after the registry was saved, the next run still knows it for ours.
        after = [*state["registry_after"], fingerprint_bytes(content)]
        write_json(self.state_path, {**state, "registry_after": after})
        self.registry_file.save_bytes(content)
        if self.registry_file.path.resolve() != self.clusters_path.resolve():
            write_bytes(self.clusters_path, content)
        if is_done:
            done = {"status": "done", "identity": state["identity"], "warning": state["warning"], "result": result}
            write_json(self.state_path, done)

    def _resume(self, state: dict[str, Any]) -> ClusterRegistry:
        path = self.registry_file.path
        if self.registry_file.fingerprint() not in (state["registry_before"], *state["registry_after"]):
            raise UserError(
                f"registry {path} was changed since batch {self.batch_id} began, so it cannot go on where it stopped; "
                f"start it anew on the present registry with --overwrite (answers stay in the cache)"
            )
        self.warning = state["warning"]
        start = json.dumps(state["registry"]).encode()
        # Marks what is on the disk as good, so that saving keeps it as the previous generation.
        if not self.warning and path.exists():
            self.registry_file.load()
        return parse_registry(start, where=self.state_path)

    def _read_state(self) -> dict[str, Any] | None:
        if not self.state_path.exists():
            return None
        try:
            return dict(json.loads(self.state_path.read_text(encoding="utf-8")))
        except ValueError as problem:
            raise UserError(
                f"{self.state_path} is damaged ({problem}); delete it, or start the batch anew with --overwrite"
            ) from None


def _parquet(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"confidence": pa.float64(), "batch_number": pa.int64(), "characters_left_out": pa.int64()}
    schema = pa.schema([pa.field(name, types.get(name, pa.string())) for name in columns])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer, write_page_checksum=True)
    return buffer.getvalue()

"""The registry of clusters: who they are, how often they were met, and what became of the merged ones.

One writer owns it. A cluster's id is made once, of its first name, and never changes; its name may. Two names that
differ in any letter of any script have different ids. A cluster that was merged stays in the registry under its own id
and points to the one that took it in, so that old results can still be read.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from common.config import UserError

N_SAMPLE_REQUESTS = 12  # kept per cluster: they are what the cluster is found by, next to its own words
ACTIVE_FROM = 3  # requests; with fewer a cluster is tentative
MAX_NAME_CHARS = 120
MAX_TEXT_CHARS = 600  # of a summary or of criteria
_SLUG_CHARS = 24  # ids stand in every prompt, so they are short
_DIGEST_CHARS = 6

Status = Literal["active", "tentative", "merged"]


class ClusterRecord(BaseModel):
    """One cluster as the registry keeps it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cluster_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    summary: str = ""
    criteria: str = ""
    sample_requests: list[str] = []
    count: int = Field(0, ge=0)
    status: Status = "tentative"
    created_at: str = ""
    updated_at: str = ""
    aliases: list[str] = []
    revision: int = Field(1, ge=1)
    merged_into: str | None = None
    parent_id: str | None = None  # the wider cluster this one was found to be a part of
    counts_by_batch: dict[str, int] = {}

    def to_prompt(self) -> dict[str, str]:
        """What a prompt says of this cluster."""
        return {
            "cluster_id": self.cluster_id,
            "name": self.name,
            "summary": self.summary,
            "criteria": self.criteria,
        }


class BatchEntry(BaseModel):
    """One batch that went into the registry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_id: str
    n_requests: int = 0
    n_assigned: int = 0
    finished_at: str = ""


class ClusterRegistry:
    """All clusters in the order of their making; every change counts up the revision of what it changes."""

    def __init__(
        self, records: Iterable[ClusterRecord] = (), *, batches: Iterable[BatchEntry] = (), revision: int = 0
    ) -> None:
        self._records = {record.cluster_id: record for record in records}
        self.batches = list(batches)
        self.revision = revision

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, cluster_id: object) -> bool:
        return cluster_id in self._records

    def get(self, cluster_id: str) -> ClusterRecord:
        """The record of an id; raises UserError where there is none."""
        if cluster_id not in self._records:
            raise UserError(f"the registry has no cluster {cluster_id!r}; get_clusters() lists the {len(self)} it has")
        return self._records[cluster_id]

    def live(self) -> list[ClusterRecord]:
        """The clusters that requests can be assigned to, in the order of their making."""
        return [record for record in self._records.values() if record.status != "merged"]

    def all_records(self) -> list[ClusterRecord]:
        """All clusters, the merged ones too, in the order of their making."""
        return list(self._records.values())

    def by_frequency(self) -> list[ClusterRecord]:
        """The live clusters, the most frequent first; equal counts in the order of their making."""
        return sorted(self.live(), key=lambda record: -record.count)

    def resolve(self, cluster_id: str | None) -> str | None:
        """The live cluster that an id stands for, through merges; None where the registry does not know it."""
        visited = set()
        while cluster_id in self._records and cluster_id not in visited:
            record = self._records[cluster_id]
            if record.status != "merged":
                return cluster_id
            visited.add(cluster_id)
            cluster_id = record.merged_into
        return None

    # --- changes -----------------------------------------------------------------------------------------------------

    def add(self, name: str, *, summary: str = "", criteria: str = "", parent_id: str | None = None) -> ClusterRecord:
        """Add a tentative cluster; a name that is taken gets a number. Raises UserError for an empty name."""
        name = clean_line(name, max_chars=MAX_NAME_CHARS)
        if not name:
            raise UserError("a cluster needs a name that is not empty")
        now = _now()
        record = ClusterRecord(
            cluster_id=make_cluster_id(name, taken=self._records),
            name=self._free_name(name),
            summary=clean_line(summary, max_chars=MAX_TEXT_CHARS),
            criteria=clean_line(criteria, max_chars=MAX_TEXT_CHARS),
            created_at=now,
            updated_at=now,
            parent_id=parent_id,
        )
        self._records[record.cluster_id] = record
        self.revision += 1
        return record

    def remove(self, cluster_id: str) -> None:
        """Forget a cluster that no request ever used."""
        if self.get(cluster_id).count:
            raise ValueError(f"cluster {cluster_id} has requests and can only be merged")
        del self._records[cluster_id]
        self.revision += 1

    def rename(self, cluster_id: str, name: str) -> ClusterRecord:
        """Give a cluster another name; the old one becomes an alias and the id stays."""
        record = self.get(cluster_id)
        name = clean_line(name, max_chars=MAX_NAME_CHARS)
        if not name:
            raise UserError(f"cluster {cluster_id} needs a name that is not empty")
        aliases = _with_alias(record.aliases, record.name, unless=name)
        return self._change(record, name=self._free_name(name, except_id=cluster_id), aliases=aliases)

    def add_alias(self, cluster_id: str, name: str) -> ClusterRecord:
        """Remember another name of a cluster."""
        record = self.get(cluster_id)
        aliases = _with_alias(record.aliases, clean_line(name, max_chars=MAX_NAME_CHARS), unless=record.name)
        return record if aliases == record.aliases else self._change(record, aliases=aliases)

    def add_requests(self, cluster_id: str, *, n: int, samples: Sequence[str], batch_id: str) -> ClusterRecord:
        """Count `n` more requests of a batch, and keep the first few different texts as samples."""
        record = self.get(cluster_id)
        counts = {**record.counts_by_batch, batch_id: record.counts_by_batch.get(batch_id, 0) + n}
        kept = list(dict.fromkeys([*record.sample_requests, *samples]))[:N_SAMPLE_REQUESTS]
        return self._change(record, count=record.count + n, counts_by_batch=counts, sample_requests=kept)

    def set_parent(self, cluster_id: str, parent_id: str) -> ClusterRecord:
        """Note that a cluster is a part of a wider one."""
        return self._change(self.get(cluster_id), parent_id=parent_id)

    def merge(self, cluster_id: str, into: str) -> ClusterRecord:
        """Merge one live cluster into another: counts add up, its names become aliases, its id stays readable."""
        source, target = self.get(cluster_id), self.get(into)
        if "merged" in (source.status, target.status) or cluster_id == into:
            raise ValueError(f"cannot merge {cluster_id} ({source.status}) into {into} ({target.status})")
        aliases = target.aliases
        for name in (source.name, *source.aliases):
            aliases = _with_alias(aliases, name, unless=target.name)
        counts = dict(target.counts_by_batch)
        for batch_id, n in source.counts_by_batch.items():
            counts[batch_id] = counts.get(batch_id, 0) + n
        samples = list(dict.fromkeys([*target.sample_requests, *source.sample_requests]))[:N_SAMPLE_REQUESTS]
        self._change(source, status="merged", merged_into=into, count=0, counts_by_batch={})
        return self._change(
            target, aliases=aliases, count=target.count + source.count, counts_by_batch=counts, sample_requests=samples
        )

    def begin_batch(self, batch_id: str) -> None:
        """Take back what an earlier run of the same batch counted, so that nothing is counted twice."""
        for record in self.all_records():
            if batch_id in record.counts_by_batch:
                counts = {name: n for name, n in record.counts_by_batch.items() if name != batch_id}
                self._change(record, count=record.count - record.counts_by_batch[batch_id], counts_by_batch=counts)
        self.batches = [entry for entry in self.batches if entry.batch_id != batch_id]

    def note_batch(self, batch_id: str, *, n_requests: int, n_assigned: int) -> None:
        """Enter a batch in the list of batches, or bring its entry up to date."""
        entry = BatchEntry(batch_id=batch_id, n_requests=n_requests, n_assigned=n_assigned, finished_at=_now())
        self.batches = [*(known for known in self.batches if known.batch_id != batch_id), entry]

    def next_batch_id(self) -> str:
        """batch-001, batch-002, …: the first that the registry has not met."""
        known = {entry.batch_id for entry in self.batches}
        number = len(known) + 1
        while f"batch-{number:03d}" in known:
            number += 1
        return f"batch-{number:03d}"

    def copy(self) -> ClusterRegistry:
        """An independent copy; the records themselves never change."""
        return ClusterRegistry(self._records.values(), batches=self.batches, revision=self.revision)

    def _change(self, record: ClusterRecord, **changes: Any) -> ClusterRecord:
        count = changes.get("count", record.count)
        if changes.get("status", record.status) != "merged":
            changes["status"] = "active" if count >= ACTIVE_FROM else "tentative"
        changed = record.model_copy(update={**changes, "revision": record.revision + 1, "updated_at": _now()})
        self._records[record.cluster_id] = changed
        self.revision += 1
        return changed

    def _free_name(self, name: str, *, except_id: str | None = None) -> str:
        """The name, or `name (2)` where a live cluster bears it: names are how people tell clusters apart."""
        borne = {normal_name(record.name) for record in self.live() if record.cluster_id != except_id}
        number, free = 1, name
        while normal_name(free) in borne:
            number += 1
            free = f"{name} ({number})"
        return free


def normal_name(name: str) -> str:
    """A name as it is compared: one form of each letter, no case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())


def make_cluster_id(name: str, *, taken: Iterable[str] = ()) -> str:
    """An id of a name: its first letters, whatever their script, and a digest of all of it.

    >>> make_cluster_id("Card not arrived")
    'card_not_arrived_1a78cb'
    """
    normal = normal_name(name)
    words = "_".join(re.findall(r"[^\W_]+", normal))[:_SLUG_CHARS].strip("_") or "cluster"
    digest = hashlib.sha256(normal.encode("utf-8", "replace")).hexdigest()
    taken = set(taken)
    candidate = f"{words}_{digest[:_DIGEST_CHARS]}"
    number = 1
    while candidate in taken:
        number += 1
        candidate = f"{words}_{digest[:_DIGEST_CHARS]}_{number}"
    return candidate


def clean_line(text: str, *, max_chars: int) -> str:
    """A text on one line without control and direction characters, cut to `max_chars`."""
    # Cf holds the marks that turn text around; the joiners in it make emoji and many scripts, and stay.
    kept = "".join(
        character if unicodedata.category(character) not in ("Cc", "Cf", "Cs") or character in "\u200c\u200d" else " "
        for character in text
    )
    line = " ".join(kept.split())
    return line if len(line) <= max_chars else line[: max_chars - 1].rstrip() + "…"


def _with_alias(aliases: list[str], name: str, *, unless: str) -> list[str]:
    known = {normal_name(alias) for alias in (*aliases, unless)}
    return aliases if not name or normal_name(name) in known else [*aliases, name]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

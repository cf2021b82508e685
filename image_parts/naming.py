"""Target names that never collide: not by case, not by Unicode form, and never longer than the file system allows."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True)
class Wanted:
    """The name that an image, and its label with it, would like to have in one target folder."""

    identity: str  # what tells it apart from all others: its path below the input folder
    stem: str
    suffixes: tuple[str, ...]  # of the image and of its label


def collision_key(name: str) -> str:
    """Return a key that is equal for names which some file system holds for one: by case or by Unicode form.

    The canonical caseless match of the Unicode standard (definition D145).
    """
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


class StemGiver:
    """Gives every entry of one folder its own stem: the wanted one, or that with `__` and a hash of its identity.

    Names with their longest suffix have at most `max_bytes` bytes; longer stems are cut before the hash. The stems
    differ from each other as such, so that `a.jpg` and `a.png` get two: their labels would be one file.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._taken: set[str] = set()

    def give(self, entry: Wanted) -> str:
        """The stem of the next entry; it depends on those before it."""
        room = self._max_bytes - max(len(os.fsencode(suffix)) for suffix in entry.suffixes)
        stem = entry.stem
        n_digits = 8
        while len(os.fsencode(stem)) > room or collision_key(stem) in self._taken:
            mark = "__" + hashlib.sha256(os.fsencode(entry.identity)).hexdigest()[:n_digits]
            stem = _cut(entry.stem, n_bytes=room - len(mark)) + mark
            n_digits += 8  # two identities with one short hash: once in 2**32 pairs
        self._taken.add(collision_key(stem))
        return stem


def _cut(stem: str, *, n_bytes: int) -> str:
    """Drop characters from the end until the name fits; a character is never cut into halves."""
    while len(os.fsencode(stem)) > n_bytes:
        stem = stem[:-1]
    return stem

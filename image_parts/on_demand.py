"""Sequences whose items are made when they are asked for, so that many of them take no memory as objects."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

Item = TypeVar("Item")


class OnDemand(Sequence[Item]):
    """Items by number, negative ones from the end; a slice is a list. IndexError beyond either end."""

    @abstractmethod
    def _make(self, number: int) -> Item:
        """The item `number`, which is from 0 to the length - 1."""

    @overload
    def __getitem__(self, number: int) -> Item: ...

    @overload
    def __getitem__(self, number: slice) -> list[Item]: ...

    def __getitem__(self, number: int | slice) -> Item | list[Item]:
        if isinstance(number, slice):
            return [self._make(place) for place in range(*number.indices(len(self)))]
        return self._make(range(len(self))[number])

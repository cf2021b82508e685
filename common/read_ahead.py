"""Read ahead: the next item of an iterator is made in a thread while the last one is worked on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")

_END = object()


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield the same items in the same order, one of them in advance.

    It pays where making an item leaves the interpreter to others, as decoding parquet does. An exception comes where
    the item would have come.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        upcoming = reader.submit(next, items, _END)
        while (item := upcoming.result()) is not _END:
            upcoming = reader.submit(next, items, _END)
            yield item  # type: ignore[misc]

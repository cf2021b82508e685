"""The table of clusters, and the one question before any file is touched."""

from __future__ import annotations

import sys

from image_parts.records import NOISE, ClusteredImages, cluster_name

# Yes in English, Ukrainian and Russian, and what the same key gives on those keyboards.
YES = frozenset({"y", "yes", "т", "так", "д", "да"})
NO = frozenset({"", "n", "no", "н", "ні", "нет"})

_MAX_ROWS = 40


def format_clusters(clustered: ClusteredImages) -> str:
    """A table of clusters and their counts, the largest first; long ones are shortened."""
    rows = [(name, int(size)) for name, size in zip(clustered.cluster_names, clustered.cluster_sizes, strict=True)]
    n_hidden = max(0, len(rows) - _MAX_ROWS)
    hidden = sum(size for _, size in rows[_MAX_ROWS:])
    rows = rows[:_MAX_ROWS]
    if n_hidden:
        rows.append((f"… {n_hidden} more", hidden))
    if clustered.n_noise:
        rows.append((cluster_name(NOISE), clustered.n_noise))
    n_images = len(clustered.records)
    rows.append(("all", n_images))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {size:>9,}  {size / max(n_images, 1):>6.1%}" for name, size in rows)


def ask(question: str) -> bool:
    """Ask on the terminal until the answer is yes or no; Enter and the end of input mean no."""
    while True:
        print(f"{question} [y/n] ", end="", file=sys.stderr, flush=True)  # noqa: T201 - stdout holds the result alone
        line = sys.stdin.readline()
        answer = line.strip().casefold()
        if answer in YES:
            return True
        if not line or answer in NO:
            return False
        print("please answer y (yes, т, так, д, да) or n", file=sys.stderr)  # noqa: T201


def can_ask() -> bool:
    """Whether somebody sits at a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()

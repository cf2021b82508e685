"""PNG pictures of a run: its curves, with the frozen encoder as a line to beat, and the confusion of the classes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from common.commit import write_bytes

# What shares a picture: title, the metrics in it (as patterns), and the frozen scores that are drawn as lines.
_PICTURES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("loss", ("train/loss", "train/cross_entropy", "train/supcon", "val/loss"), ()),
    ("accuracy", ("val/acc", "val/knn_acc"), ("frozen_knn_acc", "frozen_lr_acc")),
    ("macro_f1", ("val/f1", "val/knn_f1"), ("frozen_knn_f1", "frozen_lr_f1")),
    ("retrieval", ("val/recall@*",), ()),
    ("bank", ("bank/drift", "bank/intra_cosine", "bank/inter_cosine"), ()),
    ("learning_rate", ("train/learning_rate",), ()),
    ("anchors", ("train/anchor_share",), ()),
)
# Above this many classes the picture of their confusion has no names.
_MAX_NAMED_CLASSES = 40


def draw_curves(lines: Sequence[Mapping[str, Any]], *, frozen: Mapping[str, float], folder: Path) -> list[Path]:
    """Draw what the lines of metrics.jsonl hold, one picture a group of metrics; returns the files."""
    paths = []
    known = dict.fromkeys(name for line in lines for name, value in line.items() if value is not None)
    for title, patterns, levels in _PICTURES:
        names = [name for pattern in patterns for name in known if fnmatchcase(name, pattern)]
        series = {name: [(line["step"], line[name]) for line in lines if line.get(name) is not None] for name in names}
        if series:
            path = folder / f"{title}.png"
            write_bytes(path, _draw(title, series, {name: frozen[name] for name in levels if name in frozen}))
            paths.append(path)
    return paths


def _draw(title: str, series: Mapping[str, Sequence[tuple[int, float]]], levels: Mapping[str, float]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    for name, points in series.items():
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=name, marker="." if len(points) < 30 else None)
    for index, (name, level) in enumerate(levels.items()):
        axes.axhline(level, label=f"{name} {level:.3f}", color="gray", linestyle=("--", ":")[index % 2])
    axes.set(title=title.replace("_", " "), xlabel="optimizer step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _png(figure)


def draw_confusion(confusion: np.ndarray, *, classes: Sequence[str], path: Path) -> None:
    """Draw the share of each true class (rows) that was taken for each class (columns)."""
    from matplotlib.figure import Figure

    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.add_subplot()
    figure.colorbar(axes.imshow(shares, vmin=0, vmax=1, cmap="viridis"), label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true", title="confusion")
    if len(classes) <= _MAX_NAMED_CLASSES:
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
        axes.set_yticks(range(len(classes)), classes, fontsize=7)
    write_bytes(path, _png(figure))


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()

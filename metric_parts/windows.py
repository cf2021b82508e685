"""What one optimizer step is made of, and the padded batches of it, put together ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from metric_parts.model import JointModel, Tokens, pad_rows
from metric_parts.parallel import Processes, Share


@dataclass(frozen=True)
class Window:
    """The batches of one optimizer step; the batches of one contrast set are contrasted with each other."""

    contrast_sets: list[list[np.ndarray]]  # sets of batches of row numbers

    @property
    def batches(self) -> list[np.ndarray]:
        """All batches, in their order."""
        return [batch for contrast_set in self.contrast_sets for batch in contrast_set]


@dataclass(frozen=True)
class LoadedBatch:
    """One process's share of a batch, as tensors."""

    rows: np.ndarray  # of the whole batch
    share: Share
    tokens: dict[str, torch.Tensor]  # input_ids and attention_mask, [b, t] int64


def make_windows(
    planned: Sequence[np.ndarray], *, batch_size: int, accumulation: int, gradient_cache: bool
) -> list[Window]:
    """Windows of the planned batches of an epoch.

    Without the gradient cache `accumulation` planned batches make a window, each with a contrast set of its own. With
    it, one planned batch of up to `batch_size * accumulation` rows is one contrast set, computed in pieces.
    """
    if gradient_cache:
        return [
            Window([[batch[start : start + batch_size] for start in range(0, len(batch), batch_size)]])
            for batch in planned
        ]
    return [
        Window([[batch] for batch in planned[start : start + accumulation]])
        for start in range(0, len(planned), accumulation)
    ]


class _PaddedBatches(Dataset):
    def __init__(self, batches: list[np.ndarray], model: JointModel, tokens: Tokens, processes: Processes) -> None:
        self._batches = batches
        self._tokens = tokens
        self._padding = model.padding
        self._processes = processes

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> LoadedBatch:
        batch = self._batches[index]
        share = self._processes.share(batch)
        return LoadedBatch(batch, share, pad_rows([self._tokens.ids[row] for row in share.rows], padding=self._padding))


def load_windows(
    windows: Sequence[Window], *, model: JointModel, tokens: Tokens, processes: Processes, num_workers: int
) -> Iterator[tuple[Window, list[LoadedBatch]]]:
    """Yield each window with its batches, padded ahead by `num_workers` processes."""
    batches = [batch for window in windows for batch in window.batches]
    loader = DataLoader(
        _PaddedBatches(batches, model, tokens, processes),
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator(),  # its own, or it would draw from the random numbers of dropout
    )
    loaded = iter(loader)
    for window in windows:
        yield window, [next(loaded) for _ in window.batches]

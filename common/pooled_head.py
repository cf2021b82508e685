"""A linear classification head on a text's pooled vector, in a file of its own beside the model's weights.

Most architectures of transformers classify by their first token, whatever their vectors are pooled by, and a folder of
theirs has no place for another head. train_metric_classifier.py writes this file; common.checkpoint reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.commit import write_bytes
from common.config import UserError

POOLED_HEAD = "pooled_head.safetensors"


@dataclass(frozen=True)
class PooledHead:
    """Logits are `vectors @ weight.T + bias`; the vectors are not normalised."""

    weight: np.ndarray  # [c, d] float32
    bias: np.ndarray  # [c] float32
    pooling: str  # how its vectors are pooled: "cls", "mean" or "pooler"


def write_pooled_head(path: Path, head: PooledHead) -> None:
    """Write the file; raises OSError where the disk refuses."""
    from safetensors.numpy import save

    tensors = {"weight": np.ascontiguousarray(head.weight), "bias": np.ascontiguousarray(head.bias)}
    write_bytes(path, save(tensors, metadata={"pooling": head.pooling}))


def read_pooled_head(path: Path, *, n_classes: int) -> PooledHead:
    """Read the file; raises UserError where it is damaged or has not `n_classes` classes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            head = PooledHead(file.get_tensor("weight"), file.get_tensor("bias"), file.metadata()["pooling"])
    except (SafetensorError, KeyError, TypeError, OSError) as problem:
        raise UserError(f"classification head {path} cannot be read ({problem}); copy the model again") from problem
    if head.pooling not in ("cls", "mean", "pooler") or head.weight.shape[0] != n_classes:
        raise UserError(
            f"classification head {path} has {head.weight.shape[0]} classes pooled by {head.pooling!r}, its model's "
            f"config {n_classes} labels; copy the model again"
        )
    return head

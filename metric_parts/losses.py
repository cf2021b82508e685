"""SupCon and cross-entropy as sums, so that a mean can be taken over more than one batch.

SupCon is Khosla et al. 2020 (arXiv:2004.11362), equation 2, without their factor T / T_base:

    l(i) = -1/|P(i)| * sum over p in P(i) of log( exp(z_i·z_p / T) / sum over a != i of exp(z_i·z_a / T) )

averaged over the anchors that have a positive. An anchor without one has no loss; it still is a negative of others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class LossSum:
    """A loss summed over what it is made of; divide by the count of everything that shares an optimizer step."""

    total: torch.Tensor  # scalar float32, with its graph; 0 where there is nothing
    n: int


def supcon(vectors: torch.Tensor, codes: torch.Tensor, mask: torch.Tensor, *, temperature: float) -> LossSum:
    """Sum SupCon over the anchors: rows where `mask` is true and that share their code with another such row.

    `vectors` [n, d] un-normalised, `codes` [n] int64, `mask` [n] bool. Computed in float32, outside autocast: bfloat16
    would round a cosine near 1 by 0.0035, which the temperature multiplies.
    """
    with torch.autocast(device_type=vectors.device.type, enabled=False):
        units = F.normalize(vectors[mask].float(), dim=1)  # [m, d]
        own = codes[mask]
        itself = torch.eye(len(own), dtype=torch.bool, device=own.device)
        positives = (own[:, None] == own[None, :]) & ~itself  # [m, m]
        n_positives = positives.sum(dim=1)  # [m]
        n_anchors = int((n_positives > 0).sum())
        if n_anchors == 0:
            return LossSum(vectors.float().sum() * 0.0, 0)  # the graph stays, with gradients of zero
        # A row is not its own neighbour: it leaves before logsumexp looks for the largest value, not after.
        cosines = (units @ units.T / temperature).masked_fill(itself, -torch.inf)
        log_shares = cosines - torch.logsumexp(cosines, dim=1, keepdim=True)
        per_anchor = -log_shares.masked_fill(~positives, 0.0).sum(dim=1) / n_positives.clamp(min=1)
        return LossSum(per_anchor.sum(), n_anchors)


def cross_entropy(logits: torch.Tensor, classes: torch.Tensor, mask: torch.Tensor) -> LossSum:
    """Sum the cross-entropy over the rows where `mask` [n] is true; `logits` [n, c], `classes` [n] int64."""
    n = int(mask.sum())
    if n == 0:
        return LossSum(logits.float().sum() * 0.0, 0)
    return LossSum(F.cross_entropy(logits[mask].float(), classes[mask], reduction="sum"), n)


def count_anchors(codes: np.ndarray, mask: np.ndarray) -> int:
    """How many anchors `supcon` will find, known before any vector is: rows whose code another masked row has."""
    _, inverse, counts = np.unique(codes[mask], return_inverse=True, return_counts=True)
    return int((counts[inverse] > 1).sum())

"""One optimizer step: both losses over a window of batches, their gradients, and what there is to log of it.

The gradient of SupCon with respect to the vectors is computed first, on the vectors of the whole contrast set; then it
is carried through the encoder together with the cross-entropy, batch by batch (Gao et al. 2021, arXiv:2101.06983). For
one batch in one process this is plain back-propagation in two parts; for more it makes the contrast set larger than
what fits into memory or onto one device. With the gradient cache the batches of a set are encoded twice, with the same
dropout, since no graph is kept between.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from common.config import UserError
from metric_parts.losses import count_anchors, cross_entropy, supcon
from metric_parts.model import JointModel
from metric_parts.optimizer import make_optimizer, make_schedule
from metric_parts.parallel import Processes
from metric_parts.settings import TrainerSettings
from metric_parts.windows import LoadedBatch, Window

log = logging.getLogger(__name__)

# Steps in a row without a finite gradient after which a run is ended; an fp16 scaler needs some to find its scale.
_MAX_SKIPPED_STEPS = 20


@dataclass(frozen=True)
class Targets:
    """What the losses need to know of the training rows."""

    codes: np.ndarray  # [n] int64: number of the label, for SupCon
    classes: np.ndarray  # [n] int64: number among the classes of the head; not used where classifier_mask is 0
    metric_mask: np.ndarray  # [n] bool
    classifier_mask: np.ndarray  # [n] bool


@dataclass
class StepResult:
    """What one optimizer step did."""

    metrics: dict[str, float]
    rows: np.ndarray  # [m] int64: the training rows of the window
    vectors: np.ndarray  # [m, d] float32: what they were encoded to, in training mode
    was_skipped: bool = False


@dataclass
class _Totals:
    """Sums over a window."""

    cross_entropy: float = 0.0
    supcon: float = 0.0
    vectors: list[np.ndarray] = field(default_factory=list)


class Stepper:
    """The optimizer, its schedule and the gradient of a window."""

    def __init__(
        self, model: JointModel, *, settings: TrainerSettings, targets: Targets, processes: Processes, n_steps: int
    ) -> None:
        self.model = model
        self.settings = settings
        self.targets = targets
        self.processes = processes
        self.optimizer = make_optimizer(model, settings=settings)
        self.schedule = make_schedule(self.optimizer, settings=settings, n_steps=n_steps)
        self.scaler = torch.amp.GradScaler(model.device.split(":")[0], enabled=model.dtype == "float16")
        self.n_skipped = 0
        self._skipped_in_a_row = 0

    def step(self, window: Window, batches: list[LoadedBatch], *, number: int) -> StepResult:
        """Do optimizer step `number`; raises UserError where the loss stays without a finite gradient."""
        self.model.trained.train()
        self.optimizer.zero_grad(set_to_none=True)
        totals = self.backward(window, batches, number=number)
        rows = np.concatenate(window.batches)
        norm, was_skipped = self._update()
        metrics = self._describe(window, totals, norm)
        return StepResult(metrics, rows, np.concatenate(totals.vectors), was_skipped)

    def backward(self, window: Window, batches: list[LoadedBatch], *, number: int) -> _Totals:
        """Leave the gradient of the window's loss in the parameters; each loss is a mean over the whole window."""
        counts = self.count(window)
        totals = _Totals()
        waiting = iter(batches)
        first = 0
        for contrast_set in window.contrast_sets:
            loaded = [next(waiting) for _ in contrast_set]
            self._backward_set(loaded, totals, counts=counts, seeds=(number, first))
            first += len(loaded)
        self.processes.sum_gradients(self._parameters())
        totals.cross_entropy = self.processes.sum({"ce": totals.cross_entropy})["ce"]
        return totals

    def count(self, window: Window) -> dict[str, int]:
        """Rows of the cross-entropy and anchors of SupCon in the window, over all processes."""
        anchors = 0
        for contrast_set in window.contrast_sets:
            rows = np.concatenate(contrast_set)
            anchors += count_anchors(self.targets.codes[rows], self.targets.metric_mask[rows])
        rows = np.concatenate(window.batches)
        return {"classifier": int(self.targets.classifier_mask[rows].sum()), "anchors": anchors}

    # --- One contrast set --------------------------------------------------------------------------------------------

    def _backward_set(
        self, loaded: list[LoadedBatch], totals: _Totals, *, counts: dict[str, int], seeds: tuple[int, int]
    ) -> None:
        kept = [self._forward(loaded[0], seeds)] if len(loaded) == 1 else None
        gathered = []
        for index, batch in enumerate(loaded):
            vectors = kept[index][0] if kept else self._forward_without_graph(batch, (seeds[0], seeds[1] + index))
            gathered.append(self.processes.gather(vectors, n_rows=len(batch.rows)))
        gradients = self._vector_gradients(loaded, torch.cat(gathered), totals, n_anchors=counts["anchors"])
        totals.vectors += [vectors.cpu().numpy() for vectors in gathered]
        pieces = torch.split(gradients, [len(batch.rows) for batch in loaded])
        for index, (batch, piece) in enumerate(zip(loaded, pieces, strict=True)):
            output = kept[index] if kept else self._forward(batch, (seeds[0], seeds[1] + index))
            self._carry_back(batch, output, piece, totals, n_classifier=counts["classifier"])

    def _vector_gradients(
        self, loaded: list[LoadedBatch], vectors: torch.Tensor, totals: _Totals, *, n_anchors: int
    ) -> torch.Tensor:
        """The gradient of the weighted SupCon with respect to the vectors of a contrast set, [n, d]."""
        weight = self.settings.training.metric_loss_weight
        if n_anchors == 0 or weight == 0:
            return torch.zeros_like(vectors)
        rows = np.concatenate([batch.rows for batch in loaded])
        leaf = vectors.detach().requires_grad_()
        loss = supcon(
            leaf,
            self._tensor(self.targets.codes[rows]),
            self._tensor(self.targets.metric_mask[rows]),
            temperature=self.settings.training.supcon_temperature,
        )
        totals.supcon += float(loss.total.detach()) / n_anchors
        (gradient,) = torch.autograd.grad(weight * loss.total / n_anchors, leaf)
        return gradient

    def _carry_back(
        self,
        batch: LoadedBatch,
        output: tuple[torch.Tensor, torch.Tensor],
        gradient: torch.Tensor,
        totals: _Totals,
        *,
        n_classifier: int,
    ) -> None:
        vectors, logits = output
        rows, is_real = batch.share.rows, batch.share.is_real
        mask = self.targets.classifier_mask[rows] & is_real
        loss = cross_entropy(logits, self._tensor(self.targets.classes[rows]), self._tensor(mask))
        mean = loss.total / max(n_classifier, 1)
        totals.cross_entropy += float(mean.detach())
        own = self.processes.own(gradient, share=batch.share)
        total = self.settings.training.classification_loss_weight * mean + (vectors * own).sum()
        self.scaler.scale(total).backward()

    def _forward(self, batch: LoadedBatch, seeds: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        # Dropout is a function of the step, the batch and the process: a resumed run needs no random state, and the
        # second pass of the gradient cache drops what the first one dropped.
        entropy = np.random.SeedSequence([self.settings.training.seed, *seeds, self.processes.rank])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        return self.model.forward(batch.tokens)

    def _forward_without_graph(self, batch: LoadedBatch, seeds: tuple[int, int]) -> torch.Tensor:
        with torch.no_grad():
            return self._forward(batch, seeds)[0]

    # --- The update --------------------------------------------------------------------------------------------------

    def _update(self) -> tuple[float, bool]:
        self.scaler.unscale_(self.optimizer)
        clip = self.settings.training.gradient_clip_val or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters(), clip))
        scale = self.scaler.get_scale()
        if np.isfinite(norm) or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        was_skipped = not np.isfinite(norm) or self.scaler.get_scale() < scale
        if was_skipped:
            self._count_skipped()
        else:
            self._skipped_in_a_row = 0
            self.schedule.step()  # counts updates: one that was skipped has no place in it
        return norm, was_skipped

    def _count_skipped(self) -> None:
        self.n_skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= _MAX_SKIPPED_STEPS:
            raise UserError(
                f"the gradient has not been finite for {_MAX_SKIPPED_STEPS} steps; lower optimizer.learning_rate, "
                f"raise training.supcon_temperature, or set training.mixed_precision: no"
            )

    def _describe(self, window: Window, totals: _Totals, norm: float) -> dict[str, float]:
        training = self.settings.training
        rows = np.concatenate(window.batches)
        n_metric = int(self.targets.metric_mask[rows].sum())
        loss = training.classification_loss_weight * totals.cross_entropy + training.metric_loss_weight * totals.supcon
        return {
            "loss": loss,
            "cross_entropy": totals.cross_entropy,
            "supcon": totals.supcon,
            "anchor_share": self.count(window)["anchors"] / max(n_metric, 1),
            "labels_in_step": float(len(np.unique(self.targets.codes[rows]))),
            "rows": float(len(rows)),
            "gradient_norm": norm,
        }

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        return self.model.trained.parameters()

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.model.device)

    # --- State -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, schedule and scaler; the weights are saved as a model."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "n_skipped": self.n_skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.n_skipped = int(state["n_skipped"])

"""Validation and test: the losses, the head, and retrieval against the bank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from metric_parts.bank import Bank, Reference
from metric_parts.corpus import known_rows
from metric_parts.dataset import Rows
from metric_parts.labels import Labels
from metric_parts.losses import supcon
from metric_parts.model import Encoded, JointModel, Tokens
from metric_parts.sampler import SamplerRows, SamplerSettings, plan_epoch
from metric_parts.scores import Queries, classification_scores, retrieval_scores
from metric_parts.settings import TrainerSettings


@dataclass(frozen=True)
class HeldOut:
    """Rows to score, tokenised once."""

    rows: Rows
    tokens: Tokens
    codes: np.ndarray  # [n] int64: label numbers, NO_CLASS where training has no such label
    classes: np.ndarray  # [n] int64: numbers among the classes of the head, or NO_CLASS
    known: np.ndarray  # positions of rows that the head is scored on

    @property
    def metric(self) -> np.ndarray:
        """Positions of the rows that retrieval is scored on."""
        return np.flatnonzero(self.rows.metric_mask)


@dataclass(frozen=True)
class Evaluation:
    """Scores of one validation, and the confusion of the classes."""

    scores: dict[str, float]
    confusion: np.ndarray  # [c, c] int64: rows by truth, columns by prediction


def prepare_held_out(rows: Rows, *, labels: Labels, model: JointModel) -> HeldOut:
    """Tokenise rows and number their labels."""
    codes, classes = labels.codes(rows.labels), labels.class_codes(rows.labels)
    return HeldOut(rows, model.tokenize(rows.texts), codes, classes, known_rows(rows, labels))


def evaluate(model: JointModel, held_out: HeldOut, *, settings: TrainerSettings) -> tuple[Evaluation, Encoded]:
    """Losses, accuracy, macro-F1 and confusion of the head; and the vectors, for what else is done with them."""
    encoded = model.encode(held_out.tokens)
    known = held_out.known
    truth, logits = held_out.classes[known], encoded.logits[known]
    predicted = logits.argmax(axis=1)
    entropy = float(torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(truth)))
    contrast = _supcon_of(encoded.vectors, held_out, settings)
    training = settings.training
    loss = training.classification_loss_weight * entropy
    if np.isfinite(contrast):
        loss += training.metric_loss_weight * contrast
    scores = {"loss": loss, "cross_entropy": entropy, "supcon": contrast, **classification_scores(truth, predicted)}
    confusion = np.zeros((logits.shape[1], logits.shape[1]), np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    return Evaluation(scores, confusion), encoded


def _supcon_of(vectors: np.ndarray, held_out: HeldOut, settings: TrainerSettings) -> float:
    """SupCon over batches that are the same in every validation; NaN where no label has two rows."""
    metric = held_out.metric[held_out.codes[held_out.metric] >= 0]
    if not len(metric):
        return float("nan")
    everything = np.ones(len(metric), bool)
    rows = SamplerRows(held_out.codes[metric], everything, ~everything, held_out.rows.text_keys[metric])
    training = settings.training
    sampling = SamplerSettings(training.batch_size, training.samples_per_class)
    total, n_anchors = 0.0, 0
    for batch in plan_epoch(rows, settings=sampling, seed=training.seed, epoch=0).batches:
        codes = torch.from_numpy(rows.codes[batch])
        part = supcon(
            torch.from_numpy(vectors[metric[batch]]),
            codes,
            torch.ones(len(batch), dtype=torch.bool),
            temperature=training.supcon_temperature,
        )
        total, n_anchors = total + float(part.total), n_anchors + part.n
    return total / n_anchors if n_anchors else float("nan")


def score_retrieval(
    vectors: np.ndarray, held_out: HeldOut, reference: Reference, *, settings: TrainerSettings
) -> dict[str, float]:
    """Recall@K and the k-NN vote of the metric rows among reference vectors; empty where there are no metric rows."""
    metric = held_out.metric
    if not len(metric) or not len(reference.rows):
        return {}
    options = settings.metric_validation
    queries = Queries(vectors[metric], held_out.codes[metric], held_out.rows.text_keys[metric])
    return retrieval_scores(
        queries, reference, recall_at_k=options.recall_at_k, knn_k=options.knn_k, distance=options.distance
    )


def bank_statistics(bank: Bank, model: JointModel, tokens: Tokens, *, step: int, n_labels: int) -> dict[str, float]:
    """What the bank holds, and how far its vectors have drifted from today's weights."""
    fresh = model.encode(tokens, rows=bank.drift_rows()).vectors
    return bank.statistics(step=step, n_labels=n_labels, drift_vectors=fresh)

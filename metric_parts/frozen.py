"""The encoder as it came: what k-NN and logistic regression make of its vectors, and where the new head starts.

A head that starts from the regression knows from the first step what the frozen vectors hold, and the encoder is not
bent by the gradients of random weights (Kumar et al. 2022, arXiv:2202.10054).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.separation import effective_rank
from metric_parts.bank import Reference
from metric_parts.corpus import Corpus
from metric_parts.evaluation import HeldOut
from metric_parts.model import JointModel, Tokens
from metric_parts.scores import Queries, classification_scores, search, vote
from metric_parts.settings import TrainerSettings

log = logging.getLogger(__name__)

# Inverse regularisation of the logistic regression on unit vectors; few-shot work uses 1 to 10.
_REGRESSION_C = 10.0
# Rows that the head starts from where the scores of the frozen encoder are not wanted.
_START_ROWS = 20_000


@dataclass(frozen=True)
class Probe:
    """Vectors of classifier rows by the untrained encoder, and the regression on them."""

    reference: Reference
    regression: Any  # scikit-learn's LogisticRegression, on unit vectors


def fit_probe(model: JointModel, tokens: Tokens, corpus: Corpus, *, settings: TrainerSettings) -> Probe:
    """Encode at most `baseline_max_rows` classifier rows of training, drawn by the seed, and fit the regression."""
    from sklearn.linear_model import LogisticRegression

    rows = _probe_rows(corpus, settings)
    vectors = model.encode(tokens, rows=rows).vectors
    log.info("frozen encoder: %d vectors, effective rank %.1f", len(rows), effective_rank(vectors))
    classes = corpus.labels.class_codes([corpus.train.labels[row] for row in rows])
    regression = LogisticRegression(C=_REGRESSION_C, max_iter=1000).fit(_units(vectors), classes)
    return Probe(Reference(rows, vectors, classes, corpus.train.text_keys[rows]), regression)


def _probe_rows(corpus: Corpus, settings: TrainerSettings) -> np.ndarray:
    """Rows by the seed, among them one of each class."""
    rows = np.flatnonzero(corpus.train.classifier_mask)
    limit = settings.metric_validation.baseline_max_rows or _START_ROWS
    if len(rows) <= limit:
        return rows
    log.info("frozen encoder: %d of the training rows are used (metric_validation.baseline_max_rows)", limit)
    shuffled = np.random.default_rng(settings.training.seed).permutation(rows)
    classes = corpus.labels.class_codes([corpus.train.labels[row] for row in shuffled])
    firsts = np.unique(classes, return_index=True)[1]
    others = np.delete(np.arange(len(shuffled)), firsts)
    return np.sort(shuffled[np.concatenate([firsts, others])[: max(limit, len(firsts))]])


def start_head(model: JointModel, probe: Probe) -> None:
    """Set the head to the regression, which reads unit vectors: the mean length of a vector goes into the weights."""
    coefficients, intercepts = probe.regression.coef_, probe.regression.intercept_
    if len(coefficients) == 1:  # of two classes scikit-learn keeps one direction
        coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
        intercepts = np.concatenate([-intercepts / 2, intercepts / 2])
    length = np.sqrt((probe.reference.vectors**2).sum(axis=1).mean())
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(coefficients / length))
        model.head.bias.copy_(torch.from_numpy(intercepts))


def score_frozen(
    model: JointModel, probe: Probe, parts: dict[str, HeldOut], *, settings: TrainerSettings
) -> dict[str, dict[str, float]]:
    """Accuracy and macro-F1 of k-NN and of the regression on the rows of each of `parts` that the head is scored on."""
    options = settings.metric_validation
    frozen = {}
    for name, part in parts.items():
        encoded = model.encode(part.tokens, rows=part.known).vectors
        queries = Queries(encoded, part.classes[part.known], part.rows.text_keys[part.known])
        knn = vote(search(queries, probe.reference, k=options.knn_k, distance=options.distance))
        by_knn = classification_scores(queries.codes, knn)
        by_regression = classification_scores(queries.codes, probe.regression.predict(_units(encoded)))
        frozen[name] = {
            "frozen_knn_acc": by_knn["acc"],
            "frozen_knn_f1": by_knn["f1"],
            "frozen_lr_acc": by_regression["acc"],
            "frozen_lr_f1": by_regression["f1"],
        }
    return frozen


def _units(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

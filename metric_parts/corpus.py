"""The rows of a run: what is trained on, what is held out, and the labels they have."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from common.commit import fingerprint_files
from common.config import UserError
from metric_parts.dataset import Rows, find_shards, read_rows, share_text_keys
from metric_parts.labels import NO_CLASS, Labels, find_labels
from metric_parts.settings import TrainerSettings
from metric_parts.split import split_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Training rows, and the rows to validate and to test on where there are any."""

    train: Rows
    valid: Rows | None
    test: Rows | None
    labels: Labels


def load_corpus(settings: TrainerSettings) -> Corpus:
    """Read all rows, hold some out, and find the labels.

    Raises UserError for rows that cannot be used, for fewer than two classes, and where nothing would be held out.
    """
    data = settings.data
    given = {"train": read_rows(data.parquet_path, settings=data)}
    if data.valid_parquet_path:
        given["valid"] = _read_held_out(data.valid_parquet_path, settings, key="data.valid_parquet_path")
    if data.test_parquet_path:
        given["test"] = _read_held_out(data.test_parquet_path, settings, key="data.test_parquet_path")
    shared = dict(zip(given, share_text_keys(list(given.values())), strict=True))
    train, valid, test = shared["train"], shared.get("valid"), shared.get("test")
    if valid is None and data.val_ratio > 0:
        split = split_rows(train, val_ratio=data.val_ratio, seed=settings.training.seed)
        train, valid = train.take(split.train), train.take(split.valid)
    corpus = Corpus(train, valid, test, find_labels(train))
    _describe(corpus, settings)
    return corpus


def _read_held_out(path: str, settings: TrainerSettings, *, key: str) -> Rows:
    return read_rows(path, settings=settings.data, need_masks=False, key=key)


def input_fingerprints(settings: TrainerSettings) -> dict[str, str]:
    """What identifies the input files, by the key that names them."""
    data = settings.data
    paths = {"parquet_path": data.parquet_path, "valid_parquet_path": data.valid_parquet_path}
    paths["test_parquet_path"] = data.test_parquet_path
    return {
        name: fingerprint_files([shard.path for shard in find_shards(path)]) for name, path in paths.items() if path
    }


def _describe(corpus: Corpus, settings: TrainerSettings) -> None:
    train, labels = corpus.train, corpus.labels
    n_metric, n_classifier = int(train.metric_mask.sum()), int(train.classifier_mask.sum())
    log.info(
        "train: %d rows, %d with metric_mask, %d with classifier_mask; %d labels, %d of them classes of the head",
        *(len(train), n_metric, n_classifier, len(labels.names), len(labels.classes)),
    )
    if n_metric == 0 and settings.training.metric_loss_weight > 0:
        log.warning("metric_mask is 0 in every training row: SupCon has nothing to learn from")
    elif settings.training.classification_loss_weight == 0:
        log.warning("classification_loss_weight is 0: the head stays as it was initialised")
    for name, part in (("validation", corpus.valid), ("test", corpus.test)):
        if part is not None:
            _describe_held_out(name, part, corpus)


def _describe_held_out(name: str, part: Rows, corpus: Corpus) -> None:
    counted = known_rows(part, corpus.labels)
    log.info("%s: %d rows, %d of them scored by the head", name, len(part), len(counted))
    unknown = {label for label in part.labels if label not in corpus.labels.classes}
    if unknown:
        log.warning(
            "%s: %d rows of %d labels that no training row with classifier_mask=1 has (%s…); the head is not scored on "
            "them",
            *(name, int(part.classifier_mask.sum()) - len(counted), len(unknown), ", ".join(sorted(unknown)[:3])),
        )
    if not len(counted):
        raise UserError(f"{name}: no row has classifier_mask=1 and a class that training has; check the labels")
    n_seen = int(np.isin(part.text_keys, corpus.train.text_keys).sum())
    if n_seen:
        log.warning("%s: %d rows have the text of a training row; scores on them are too good", name, n_seen)


def known_rows(rows: Rows, labels: Labels) -> np.ndarray:
    """Positions of the rows that the head can be scored on: classifier rows of a class that it has."""
    return np.flatnonzero(rows.classifier_mask & (labels.class_codes(rows.labels) != NO_CLASS))

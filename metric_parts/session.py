"""What a run works with: rows, model, optimizer and bank, new or as a checkpoint left them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.commit import Identity, describe_changes
from common.config import UserError, settings_to_dict
from common.model_files import model_fingerprint, resolve_model
from common.pooling import read_pooling
from metric_parts.bank import Bank
from metric_parts.checkpoints import Checkpoint, CheckpointStore, RunState, read_checkpoint, restore
from metric_parts.corpus import Corpus, input_fingerprints
from metric_parts.evaluation import HeldOut, prepare_held_out
from metric_parts.frozen import Probe, fit_probe, start_head
from metric_parts.model import JointModel, Tokens
from metric_parts.parallel import Processes
from metric_parts.planning import count_steps, plan_of, sampler_rows
from metric_parts.pretrained import load_model
from metric_parts.settings import TrainerSettings
from metric_parts.steps import Stepper, Targets
from metric_parts.trackers import flatten
from metric_parts.windows import Window, make_windows

log = logging.getLogger(__name__)

# Keys that change where and how a run works, not its numbers.
_NOT_IN_IDENTITY = (
    "device",
    "progress",
    "log_level",
    "curves",
    "data.parquet_path",
    "data.valid_parquet_path",
    "data.test_parquet_path",
    "data.num_workers",
    "training.resume_from",
    "checkpointing.checkpoints_dir",
    "checkpointing.save_every_n_bathces",
    "checkpointing.keep_last_n",
)
_SECTIONS_NOT_IN_IDENTITY = ("tensorboard.", "mlflow.", "neptune.")


@dataclass
class Session:
    """Everything that a run works with."""

    settings: TrainerSettings
    corpus: Corpus
    model: JointModel
    tokens: Tokens
    valid: HeldOut | None
    stepper: Stepper
    bank: Bank
    state: RunState
    processes: Processes
    n_steps: int
    probe: Probe | None = None  # of the untrained encoder; None where a run goes on

    def windows(self, epoch: int) -> list[Window]:
        """All windows of an epoch; the same ones whenever they are asked for."""
        training = self.settings.training
        plan = plan_of(self.corpus, settings=self.settings, epoch=epoch)
        return make_windows(
            plan.batches,
            batch_size=training.batch_size,
            accumulation=training.gradient_accumulation_steps,
            gradient_cache=training.gradient_cache,
        )


def identify(settings: TrainerSettings, corpus: Corpus) -> dict[str, Any]:
    """What the numbers of a run depend on: keys, labels, input files and the model it starts from."""
    keys = {
        name: value
        for name, value in flatten(settings_to_dict(settings)).items()
        if name not in _NOT_IN_IDENTITY and not name.startswith(_SECTIONS_NOT_IN_IDENTITY)
    }
    keys["labels"] = list(corpus.labels.names)
    keys["classes"] = list(corpus.labels.classes)
    inputs = {**input_fingerprints(settings), "model_name": model_fingerprint(settings.model_name)}
    return Identity("train_metric_classifier", keys, inputs).to_dict()


def find_start(store: CheckpointStore, *, settings: TrainerSettings) -> Checkpoint | None:
    """The checkpoint to go on from, or None to start anew.

    Raises UserError where the folder holds another run, or nothing but damaged checkpoints.
    """
    asked = settings.training.resume_from
    if asked not in (None, "auto"):
        return _named_checkpoint(store, Path(str(asked)))
    if not store.has_checkpoints():
        _require_same(store, store.leftover() or store.identity)
        return None
    if asked is None:
        raise UserError(
            f"{store.folder} holds a run and training.resume_from is null; set it to auto to go on, or start with "
            f"--overwrite"
        )
    newest = store.newest()
    if newest is None:
        raise UserError(f"every checkpoint in {store.folder} is damaged; start with --overwrite, or restore one")
    _require_same(store, newest.identity)
    return newest


def _named_checkpoint(store: CheckpointStore, path: Path) -> Checkpoint:
    """The checkpoint that the config asks for."""
    chosen = read_checkpoint(path)
    if chosen.path.resolve().parent != store.folder.resolve():
        raise UserError(
            f"training.resume_from {path} is not in checkpointing.checkpoints_dir {store.folder}; to start from "
            f"its weights instead, give it as model_name"
        )
    _require_same(store, chosen.identity)
    return chosen


def _require_same(store: CheckpointStore, found: dict[str, Any]) -> None:
    if found != store.identity:
        raise UserError(
            f"the run in {store.folder} was made otherwise: {describe_changes(found, store.identity)}; "
            f"set it back, choose another checkpoints_dir, or start with --overwrite"
        )


def open_session(
    settings: TrainerSettings, *, corpus: Corpus, checkpoint: Checkpoint | None, processes: Processes
) -> Session:
    """Load the model, new or from a checkpoint, and all that goes with it."""
    model = _open_model(settings, corpus=corpus, checkpoint=checkpoint, processes=processes)
    tokens = model.tokenize(corpus.train.texts)
    _count_truncated("train", tokens, model)
    probe = None
    if checkpoint is None:
        probe = _probe(model, tokens, corpus, settings=settings, processes=processes)
    rows, classes = sampler_rows(corpus), corpus.labels.class_codes(corpus.train.labels)
    targets = Targets(rows.codes, classes, rows.metric_mask, rows.classifier_mask)
    n_steps = count_steps(corpus, settings=settings)
    stepper = Stepper(model, settings=settings, targets=targets, processes=processes, n_steps=n_steps)
    bank = Bank(n_steps=settings.metric_validation.keep_last_n_emb_steps, codes=targets.codes, text_keys=rows.text_keys)
    if checkpoint:
        restore(checkpoint, stepper=stepper, bank=bank)
        log.info("going on from %s: step %d of about %d", checkpoint.path, checkpoint.state.step, n_steps)
    valid = None
    if corpus.valid is not None:
        valid = prepare_held_out(corpus.valid, labels=corpus.labels, model=model)
        _count_truncated("validation", valid.tokens, model)
    _describe_bank(settings, model, len(corpus.train))
    state = checkpoint.state if checkpoint else RunState()
    return Session(settings, corpus, model, tokens, valid, stepper, bank, state, processes, n_steps, probe)


def _open_model(
    settings: TrainerSettings, *, corpus: Corpus, checkpoint: Checkpoint | None, processes: Processes
) -> JointModel:
    """The model that is asked for, with the weights of the checkpoint where there is one."""
    resolved = resolve_model(settings.model_name)
    return load_model(
        str(checkpoint.path) if checkpoint else settings.model_name,
        settings=settings,
        classes=corpus.labels.classes,
        device=processes.device(settings.device),
        pooling=read_pooling(resolved) if settings.pooling == "auto" else settings.pooling,
        tokenizer_source=settings.model_name,  # one that was saved and loaded again writes other files
    )


def _probe(
    model: JointModel, tokens: Tokens, corpus: Corpus, *, settings: TrainerSettings, processes: Processes
) -> Probe | None:
    """Fit the probe where the scores or the head's start need it, and start a new head from it."""
    starts_head = model.has_new_head and settings.training.head_start == "regression"
    if not (starts_head or settings.metric_validation.baseline_max_rows):
        return None
    probe = fit_probe(model, tokens, corpus, settings=settings)
    if starts_head:
        start_head(model, probe)
        processes.take_from_first(model.head.parameters())
    return probe


def _count_truncated(name: str, tokens: Tokens, model: JointModel) -> None:
    if tokens.n_truncated:
        texts = "text is" if tokens.n_truncated == 1 else "texts are"
        log.warning("%s: %d %s longer than %d tokens and cut", name, tokens.n_truncated, texts, model.max_length)


def _describe_bank(settings: TrainerSettings, model: JointModel, n_rows: int) -> None:
    training = settings.training
    a_step = training.batch_size * training.gradient_accumulation_steps
    n_vectors = min(a_step * settings.metric_validation.keep_last_n_emb_steps, n_rows * training.num_epochs)
    size = n_vectors * model.network.config.hidden_size * np.dtype(np.float32).itemsize
    log.info("the bank will hold up to %d vectors, %.0f MiB", n_vectors, size / 2**20)

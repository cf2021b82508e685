"""Train one encoder on two tasks: telling classes apart, and bringing equals together.

    python train_metric_classifier.py --config metric_classifier_training.example.yaml

Reads parquet rows with `text`, `label`, `metric_mask` and `classifier_mask`, as cluster_update_dataset.py writes them.
The loss is classification_loss_weight * cross-entropy of the rows with classifier_mask=1, plus metric_loss_weight *
SupCon of the rows with metric_mask=1. Writes into checkpointing.checkpoints_dir: `best`, a Hugging Face folder that
cluster_supervise.py takes as model_name_or_path; checkpoints to resume from; metrics.jsonl, summary.json and pictures.
A run that was killed goes on where it stood, with the numbers of one that was not. Several GPUs: torchrun.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from common import cli
from common.commit import OutputLock, write_json
from common.config import settings_to_dict
from metric_parts.settings import TrainerSettings

if TYPE_CHECKING:
    from metric_parts.checkpoints import CheckpointStore
    from metric_parts.evaluation import HeldOut
    from metric_parts.parallel import Processes
    from metric_parts.session import Session
    from metric_parts.steps import StepResult
    from metric_parts.trackers import Record
    from metric_parts.windows import Window

log = logging.getLogger(__name__)


def run(settings: TrainerSettings, *, overwrite: bool = False) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint where there is one; returns what the last line of stdout says."""
    from metric_parts.checkpoints import CheckpointStore
    from metric_parts.corpus import load_corpus
    from metric_parts.report import finished_result
    from metric_parts.session import find_start, identify, open_session

    folder = Path(settings.checkpointing.checkpoints_dir)
    with join(settings) as processes, hold(folder, processes):
        corpus = load_corpus(settings)
        identity = identify(settings, corpus)
        if not overwrite and (result := finished_result(folder, identity=identity)):
            log.info("%s is finished and nothing has changed", folder)
            return result
        store = CheckpointStore(folder, identity=identity, keep_last_n=settings.checkpointing.keep_last_n)
        if processes.is_first:
            store.remove_unfinished()
            if overwrite:
                store.clear()
        processes.wait()
        checkpoint = find_start(store, settings=settings)
        processes.wait()
        if processes.is_first and checkpoint is None:
            store.clear()  # what a run left that was ended before its first checkpoint
        session = open_session(settings, corpus=corpus, checkpoint=checkpoint, processes=processes)
        return train(session, store)


def train(session: Session, store: CheckpointStore) -> dict[str, Any]:
    """Go through the epochs, and leave the best checkpoint, the record and the pictures."""
    from metric_parts.trackers import Record, flatten
    from metric_parts.windows import load_windows

    settings, state = session.settings, session.state
    watch = cli.Stopwatch()
    record = Record(settings, folder=store.folder)
    if session.processes.is_first:
        record.start(flatten(settings_to_dict(settings)), step=state.step, n_bytes=state.metrics_bytes)
        measure_frozen(session, record)
    n_rows_before = state.rows
    with cli.Progress(
        session.n_steps, label="train", unit="steps", enabled=shows(session), done=state.step
    ) as progress:
        for epoch in range(state.epoch, settings.training.num_epochs):
            windows = session.windows(epoch)
            todo = windows[state.window :]
            loaded = load_windows(
                todo,
                model=session.model,
                tokens=session.tokens,
                processes=session.processes,
                num_workers=settings.data.num_workers,
            )
            for window, batches in loaded:
                result = session.stepper.step(window, batches, number=state.step)
                session.bank.add(result.rows, result.vectors, step=state.step)
                finish_step(session, store, record, window=window, result=result, n_windows=len(windows))
                progress.update(1)
    return finish(session, store, record, seconds=watch.seconds, n_rows=state.rows - n_rows_before)


def finish_step(
    session: Session,
    store: CheckpointStore,
    record: Record,
    *,
    window: Window,
    result: StepResult,
    n_windows: int,
) -> None:
    """Count the step, and log, validate and save where it is time to."""
    settings, state = session.settings, session.state
    before = state.batches
    ends_epoch = state.advance(n_batches=len(window.batches), n_rows=len(result.rows), n_windows=n_windows)
    if not session.processes.is_first:
        return
    state.add(result.metrics)
    if state.step % settings.training.log_every_n_steps == 0 or ends_epoch:
        log_training(session, record)
    is_last = state.epoch == settings.training.num_epochs
    every = settings.metric_validation.every_n_batches
    is_due = state.batches // every > before // every if every else ends_epoch
    if session.valid is not None and (is_due or is_last):
        validate(session, store, record, valid=session.valid)
    if is_last and state.best_step is None:  # without validation the last model is the best that is known
        save_best(session, store)
    save_every = settings.checkpointing.save_every_n_bathces
    if state.batches // save_every > before // save_every or is_last:
        path = store.save(state, model=session.model, stepper=session.stepper, bank=session.bank)
        log.info("saved %s", path)


def log_training(session: Session, record: Record) -> None:
    """Log the means of the steps since the last time."""
    state = session.state
    metrics = {f"train/{name}": mean for name, mean in state.take_means().items()}
    metrics["train/learning_rate"] = float(session.stepper.schedule.get_last_lr()[0])
    metrics["train/skipped_steps"] = float(session.stepper.n_skipped)
    metrics["epoch"] = float(state.epoch)
    state.metrics_bytes = record.log(metrics, step=state.step)


def measure_frozen(session: Session, record: Record) -> None:
    """Before the first step: what k-NN and logistic regression make of the encoder as it came."""
    from metric_parts.evaluation import prepare_held_out
    from metric_parts.frozen import score_frozen

    state, corpus = session.state, session.corpus
    probe, session.probe = session.probe, None  # its vectors are not needed any more
    if state.step or probe is None or not session.settings.metric_validation.baseline_max_rows:
        return
    parts = {"val": session.valid} if session.valid is not None else {}
    if corpus.test is not None:
        parts["test"] = prepare_held_out(corpus.test, labels=corpus.labels, model=session.model)
    if not parts:
        return
    state.frozen = score_frozen(session.model, probe, parts, settings=session.settings)
    metrics = {f"val/{name}": value for name, value in state.frozen.get("val", {}).items()}
    if metrics:
        state.metrics_bytes = record.log(metrics, step=0)
        log.info(
            "frozen encoder on validation: %s", ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        )


def validate(session: Session, store: CheckpointStore, record: Record, *, valid: HeldOut) -> None:
    """Score the validation rows, log them beside the frozen encoder's, and save the model if it is the best so far."""
    from metric_parts.evaluation import bank_statistics, evaluate, score_retrieval
    from metric_parts.report import describe_scores
    from metric_parts.scores import is_better

    settings, state = session.settings, session.state
    evaluation, encoded = evaluate(session.model, valid, settings=settings)
    scores = dict(evaluation.scores)
    scores |= score_retrieval(encoded.vectors, valid, session.bank.reference(), settings=settings)
    n_labels = len(session.corpus.labels.names)
    bank = bank_statistics(session.bank, session.model, session.tokens, step=state.step, n_labels=n_labels)
    metrics = {**{f"val/{name}": value for name, value in scores.items()}, **bank}
    state.metrics_bytes = record.log(metrics, step=state.step)
    log.info("step %d: %s", state.step, describe_scores(scores, state.frozen.get("val", {})))
    by = settings.checkpointing.save_best_by
    if is_better(scores[by], state.best_value, by=by):
        state.best_value, state.best_step, state.best_scores = scores[by], state.step, scores
        state.best_confusion = evaluation.confusion.tolist()
        save_best(session, store)


def save_best(session: Session, store: CheckpointStore) -> None:
    """Save the model as the best one, with the architecture's own head fitted to ours."""
    from metric_parts.own_head import fit_own_head

    session.state.own_head_agreement = fit_own_head(session.model, session.tokens, seed=session.settings.training.seed)
    store.save_best(session.state, model=session.model)


def finish(session: Session, store: CheckpointStore, record: Record, *, seconds: float, n_rows: int) -> dict[str, Any]:
    """Score the test rows once, with the best checkpoint, and write the summary, the confusion and the pictures."""
    from metric_parts.report import draw_pictures, score_test, summarize, write_confusion

    if not session.processes.is_first:
        return {}
    test = score_test(session, store)
    summary = summarize(session, store, test=test)
    summary["speed"] = {"seconds": round(seconds, 1), "rows_per_s": round(n_rows / seconds, 1)}
    write_confusion(session, store.folder / "confusion.csv")
    lines = record.finish()
    if session.settings.curves:
        draw_pictures(session, lines, folder=store.folder / "curves")
    write_json(store.folder / "summary.json", summary)
    log.info("%d rows in %.0f s, %.1f rows/s", n_rows, seconds, n_rows / seconds)
    return dict(summary["result"])


def check(settings: TrainerSettings) -> dict[str, Any]:
    """Validate the inputs and return the plan: rows, labels, batches, steps."""
    from common.model_files import resolve_model
    from metric_parts.corpus import load_corpus
    from metric_parts.planning import count_steps, plan_of

    resolve_model(settings.model_name)
    corpus = load_corpus(settings)
    plan = plan_of(corpus, settings=settings, epoch=0)
    return {
        "train_rows": len(corpus.train),
        "validation_rows": len(corpus.valid) if corpus.valid else 0,
        "test_rows": len(corpus.test) if corpus.test else 0,
        "labels": len(corpus.labels.names),
        "classes": len(corpus.labels.classes),
        "rows_an_epoch": plan.n_rows,
        "equal_texts_left_out": plan.n_copies,
        "rows_without_a_pair_left_out": plan.n_lone,
        "batches_an_epoch": len(plan.batches),
        "optimizer_steps": count_steps(corpus, settings=settings),
        "checkpoints_dir": settings.checkpointing.checkpoints_dir,
    }


# --- Processes -------------------------------------------------------------------------------------------------------


@contextmanager
def join(settings: TrainerSettings) -> Iterator[Processes]:
    """This process among those that torchrun started; the first one speaks for all."""
    from metric_parts.parallel import join_processes, leave_processes

    processes = join_processes(settings.device)
    if not processes.is_first:
        for name in ("__main__", "common", "metric_parts"):
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield processes
        # Together: a process that leaves while the first still writes can take the connection down with it.
        processes.wait()
    finally:
        leave_processes()


@contextmanager
def hold(folder: Path, processes: Processes) -> Iterator[None]:
    """Hold the output for the first process; the others write nothing."""
    if processes.is_first:
        with OutputLock(folder, is_file=False):  # "runs/v1.5" is a folder too
            yield
    else:
        yield


def shows(session: Session) -> bool:
    """Whether this process shows its progress."""
    return session.settings.progress and session.processes.is_first


def end_process(exit_code: int) -> NoReturn:
    """End this process; one of several without the interpreter's own clearing up.

    All is on the disk by then. But about one run in twelve was aborted in that clearing up, by a thread of torch, and
    a finished training told torchrun and cron that it had failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


if __name__ == "__main__":
    from train_metric_classifier import TrainerSettings, check, run  # by name, so that workers can import them

    end_process(cli.main(TrainerSettings, run, doc=__doc__, section=None, check=check))

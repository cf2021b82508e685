"""The end of a run: the test, summary.json, confusion.csv, and the line that the script prints."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.commit import write_bytes
from common.outputs import library_versions
from metric_parts.checkpoints import BEST, CheckpointStore
from metric_parts.curves import draw_confusion, draw_curves
from metric_parts.evaluation import evaluate, prepare_held_out
from metric_parts.pretrained import load_model
from metric_parts.session import Session

_SHOWN = ("loss", "acc", "f1", "knn_f1", "recall@1")


def describe_scores(scores: Mapping[str, float], frozen: Mapping[str, float]) -> str:
    """Our scores, and the frozen encoder's beside them, on one line."""
    ours = ", ".join(f"{name} {scores[name]:.4f}" for name in _SHOWN if name in scores)
    if not frozen:
        return ours
    return f"{ours} | frozen encoder: k-NN acc {frozen['frozen_knn_acc']:.4f}, LR acc {frozen['frozen_lr_acc']:.4f}"


def score_test(session: Session, store: CheckpointStore) -> dict[str, float]:
    """Scores of the test rows by the best checkpoint; empty where there are no test rows."""
    if session.corpus.test is None:
        return {}
    model = load_model(
        str(store.folder / BEST),
        settings=session.settings,
        classes=session.corpus.labels.classes,
        device=session.model.device,
        pooling=session.model.pooling,
    )
    held_out = prepare_held_out(session.corpus.test, labels=session.corpus.labels, model=model)
    evaluation, _ = evaluate(model, held_out, settings=session.settings)
    return evaluation.scores


def summarize(session: Session, store: CheckpointStore, *, test: Mapping[str, float]) -> dict[str, Any]:
    """What summary.json says, but for the speed."""
    state, corpus = session.state, session.corpus
    best = {name: state.best_scores[name] for name in ("acc", "f1") if name in state.best_scores}
    result = {
        "best": str(store.folder / BEST),
        "step": state.best_step or state.step,
        **{f"val_{name}": _rounded(value) for name, value in best.items()},
        **{f"test_{name}": _rounded(test[name]) for name in ("acc", "f1") if name in test},
        **{name: _rounded(value) for name, value in _frozen_beside(state.frozen, has_test=bool(test)).items()},
    }
    return {
        "result": result,
        "steps": state.step,
        "skipped_steps": session.stepper.n_skipped,
        "rows": {
            "train": len(corpus.train),
            "validation": len(corpus.valid) if corpus.valid else 0,
            "test": len(corpus.test) if corpus.test else 0,
            "train_truncated": session.tokens.n_truncated,
        },
        "validation": _finite(state.best_scores),
        "test": _finite(test),
        "own_head_agreement": state.own_head_agreement,
        "frozen": {name: _finite(scores) for name, scores in state.frozen.items()},
        "labels": corpus.labels.to_dict(),
        "identity": store.identity,
        "versions": library_versions(),
    }


def _frozen_beside(frozen: Mapping[str, Mapping[str, float]], *, has_test: bool) -> dict[str, float]:
    scores = frozen.get("test" if has_test else "val", {})
    return {name: scores[name] for name in ("frozen_knn_acc", "frozen_lr_acc") if name in scores}


def _finite(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(value) if np.isfinite(value) else None for name, value in scores.items()}


def _rounded(value: float) -> float:
    return round(float(value), 4)


def write_confusion(session: Session, path: Path) -> None:
    """Rows of each true class (down) by predicted class (across), of the best checkpoint on validation."""
    classes, confusion = session.corpus.labels.classes, session.state.best_confusion
    if not confusion:
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true", *classes])
    writer.writerows([name, *counts] for name, counts in zip(classes, confusion, strict=True))
    write_bytes(path, text.getvalue().encode())


def draw_pictures(session: Session, lines: list[dict[str, Any]], *, folder: Path) -> None:
    """The curves of the record, and the confusion of the best checkpoint on validation."""
    draw_curves(lines, frozen=session.state.frozen.get("val", {}), folder=folder)
    if session.state.best_confusion:
        confusion = np.asarray(session.state.best_confusion)
        draw_confusion(confusion, classes=session.corpus.labels.classes, path=folder / "confusion.png")


def finished_result(folder: Path, *, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a run that is finished and was made from the same things; else None."""
    path = folder / "summary.json"
    if not path.is_file() or not (folder / BEST).exists():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    return dict(summary["result"]) if summary.get("identity") == identity else None

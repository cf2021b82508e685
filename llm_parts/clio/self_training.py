"""The sentence embedder fine-tuned on its own confident clusters, and what that gained.

    trained = self_train(texts, vectors, base, settings=settings, seed=7, model_dir=output_dir / "embedder")
    trained.rows                                        # scores before and after, on rows that were not learnt from
    settings = trained.settings if trained.is_kept else settings

Rows that lie much nearer to their own centroid than to any other are taken as sure. Two of one cluster are a pair that
belongs together; two of different clusters are one that does not, unless their clusters are next to each other: those
are never in one batch, since a topic that was cut in two would be torn apart for good. The loss is this project's own
SupCon (metric_parts.losses).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.commit import make_folder, sync_folder
from common.config import ConfigError
from common.progress import Progress
from llm_parts.clio.base_clusters import BaseClusters, cluster_vectors
from llm_parts.clio.confident_rows import batches, choose_held_out, confident_rows, count_steps, rivals
from llm_parts.clio.embedding import embed_texts
from llm_parts.clio.measures import as_row, measure_clusters
from llm_parts.clio.vector_settings import VectorSettings
from llm_parts.word_vectors import WordEmbedder

if TYPE_CHECKING:
    import torch

    from common.encoder import TextEncoder

log = logging.getLogger(__name__)

_WARM_UP = 0.1  # share of the steps in which the learning rate rises
_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class SelfTraining:
    """What became of a self-training."""

    model_dir: Path  # the fine-tuned model, in the form that `embedding.sentence_model` takes
    settings: VectorSettings  # those given, with the fine-tuned model
    is_kept: bool  # clusterings by different seeds agree at least as well as before
    rows: list[dict[str, Any]]  # "before", "after" and "gain" for a report
    n_learnt: int  # rows that were learnt from
    n_steps: int


def check_self_training(settings: VectorSettings) -> None:
    """Refuse what cannot be fine-tuned, before anything is done; raises ConfigError."""
    if not settings.self_training.enabled:
        return
    if settings.embedder != "sentence" or settings.embedding.sentence_model == WordEmbedder.name:
        raise ConfigError(
            "clio.self_training.enabled: only a sentence model can be fine-tuned; set clio.embedder: sentence and "
            "clio.embedding.sentence_model to one"
        )


def self_train(
    texts: Sequence[str],
    vectors: np.ndarray,
    base: BaseClusters,
    *,
    settings: VectorSettings,
    seed: int,
    model_dir: Path,
    true_labels: Sequence[object] | None = None,
    progress: bool = False,
) -> SelfTraining:
    """Fine-tune `embedding.sentence_model` on the clusters `base` of `texts` [n], save it and measure the gain.

    `vectors` [n, d] are the texts as the model embeds them before, of unit length.
    `model_dir` is written as a whole or not at all, and replaced where it is. The rows `before` and `after` are scored
    with the labels of a clustering of all rows, over the rows that were held out. Silhouette and coherence are measured
    in the space of their own model, which training makes tidier by design; nmi, ari, acc and stability say whether it
    is also truer. `true_labels` [n] add scores and decide nothing.

    Raises UserError where fewer than two clusters have two sure rows that differ.
    """
    check_self_training(settings)
    held_out = choose_held_out(texts, share=settings.self_training.holdout, seed=seed)
    groups = confident_rows(vectors, base, texts, without=held_out, options=settings.self_training, seed=seed)
    encoder = _load_trainable(settings)
    n_steps = _train(encoder, texts, groups, rivals(base.centroids), settings=settings, seed=seed, progress=progress)
    save_encoder(encoder, model_dir)
    after = _with_model(settings, model_dir)
    scores = [
        _scores(each, held_out, settings=settings, seed=seed, true_labels=true_labels)
        for each in (vectors, embed_texts(texts, settings=after))
    ]
    is_kept = scores[1]["stability"] >= scores[0]["stability"]
    log.info("self-training: %s; stability %.3f, before %.3f", "kept" if is_kept else "left", *_pair(scores))
    n_learnt = sum(len(rows) for rows in groups.values())
    return SelfTraining(model_dir, after, is_kept, _table(*scores), n_learnt, n_steps)


# --- Training --------------------------------------------------------------------------------------------------------


def _load_trainable(settings: VectorSettings) -> TextEncoder:
    """The sentence model anew: the one that `load_encoder` keeps must stay what it is."""
    from common.backend import choose_device
    from common.encoder import load_encoder

    options = settings.embedding
    load = load_encoder.__wrapped__
    return load(options.sentence_model, device=choose_device("auto"), max_length=options.max_length)


def _train(
    encoder: TextEncoder,
    texts: Sequence[str],
    groups: dict[int, np.ndarray],
    near: Sequence[set[int]],
    *,
    settings: VectorSettings,
    seed: int,
    progress: bool,
) -> int:
    """Train in place; returns the number of steps. The random state of the process is left as it was."""
    import torch

    from metric_parts.losses import supcon

    options = settings.self_training
    n_steps = count_steps(groups, options=options)
    optimizer = torch.optim.AdamW(encoder.model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, n_steps))
    with torch.random.fork_rng(), Progress(n_steps, label="self-training", unit="steps", enabled=progress) as bar:
        torch.manual_seed(seed)
        encoder.model.train()
        for rows, codes in batches(groups, near, options=options, seed=seed):
            vectors = _forward(encoder, [texts[row] for row in rows])
            own = torch.from_numpy(codes.astype(np.int64)).to(vectors.device)
            loss = supcon(vectors, own, torch.ones_like(own, dtype=torch.bool), temperature=options.temperature)
            optimizer.zero_grad(set_to_none=True)
            (loss.total / max(loss.n, 1)).backward()
            torch.nn.utils.clip_grad_norm_(encoder.model.parameters(), _MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            bar.update(1)
        encoder.model.eval()
    return n_steps


def _forward(encoder: TextEncoder, texts: Sequence[str]) -> torch.Tensor:
    """Vectors [b, d] with their graph."""
    from common.pooling import pool

    tokens = encoder.tokenizer(
        list(texts), padding=True, truncation=True, max_length=encoder.max_length, return_tensors="pt"
    ).to(encoder.device)
    output = encoder.model(**tokens)
    return pool(output.last_hidden_state, tokens["attention_mask"], encoder.pooling)


def _rate(step: int, n_steps: int) -> float:
    """Share of the peak learning rate: up along a line, then down along one, above 0 to the end."""
    warm = max(1, round(_WARM_UP * n_steps))
    return (step + 1) / warm if step < warm else max(0.0, (n_steps - step) / max(1, n_steps - warm + 1))


def save_encoder(encoder: TextEncoder, folder: Path) -> None:
    """Save a model that `load_encoder` and sentence-transformers read; the folder appears as a whole or not at all."""
    make_folder(folder.parent)
    temporary = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        encoder.model.save_pretrained(temporary)
        encoder.tokenizer.save_pretrained(temporary)
        _write_pooling(encoder, temporary)
        for path in temporary.rglob("*"):
            sync_folder(path)  # files too: what the rename makes visible must be on the disk
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder.parent)


def _write_pooling(encoder: TextEncoder, folder: Path) -> None:
    pooling = {
        "word_embedding_dimension": encoder.dimension,
        "pooling_mode_mean_tokens": encoder.pooling == "mean",
        "pooling_mode_cls_token": encoder.pooling == "cls",
    }
    make_folder(folder / "1_Pooling")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=2), encoding="utf-8")
    length = {"max_seq_length": encoder.max_length, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(length, indent=2), encoding="utf-8")


# --- The gain --------------------------------------------------------------------------------------------------------


def _with_model(settings: VectorSettings, model_dir: Path) -> VectorSettings:
    embedding = settings.embedding.model_copy(update={"sentence_model": str(model_dir.resolve())})
    return settings.model_copy(update={"embedding": embedding})


def _scores(
    vectors: np.ndarray,
    held_out: np.ndarray,
    *,
    settings: VectorSettings,
    seed: int,
    true_labels: Sequence[object] | None,
) -> dict[str, float]:
    """Scores of the held-out rows in a clustering of all rows, and the stability of that."""
    runs = max(2, settings.clustering.stability_runs)  # it is what decides
    settings = settings.model_copy(
        update={"clustering": settings.clustering.model_copy(update={"stability_runs": runs})}
    )
    base = cluster_vectors(vectors, settings=settings, seed=seed)
    rows = np.flatnonzero(held_out)
    labels = None if true_labels is None else [true_labels[int(row)] for row in rows]
    scores = measure_clusters(vectors[rows], base.labels[rows], true_labels=labels, seed=seed)
    return {**scores, "stability": base.scores["stability"]}


def _pair(scores: list[dict[str, float]]) -> tuple[float, float]:
    return scores[1]["stability"], scores[0]["stability"]


def _table(before: dict[str, float], after: dict[str, float]) -> list[dict[str, Any]]:
    gain = {name: after[name] - before[name] for name in before if name not in ("rows", "clusters", "noise")}
    return [
        {"model": "before", **as_row(before)},
        {"model": "after", **as_row(after)},
        {"model": "gain", **{name: None for name in before}, **as_row(gain)},
    ]

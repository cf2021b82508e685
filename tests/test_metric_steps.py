"""Gradients of an optimizer step: accumulation, the gradient cache, and two processes for one."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from common.config import settings_from_values
from metric_parts.corpus import load_corpus
from metric_parts.losses import cross_entropy, supcon
from metric_parts.model import pad_rows
from metric_parts.optimizer import make_optimizer, make_schedule
from metric_parts.parallel import Processes
from metric_parts.pretrained import load_model
from metric_parts.session import open_session
from metric_parts.settings import TrainerSettings
from metric_parts.windows import LoadedBatch, Window
from tests.tiny_encoder import still_encoder, tiny_encoder, training_rows, write_rows  # noqa: F401  fixtures


def make_settings(model, rows_path, *, out="unused", **training):
    values = {
        "model_name": str(model),
        "curves": False,
        "checkpointing": {"checkpoints_dir": str(out)},
        "data": {"parquet_path": str(rows_path), "val_ratio": 0},
        "training": {"batch_size": 8, "max_seq_length": 32, **training},
    }
    return settings_from_values(TrainerSettings, values, source="test")


@pytest.fixture(scope="module")
def rows_path(tmp_path_factory):
    rows = training_rows(n_classes=4, n_per_class=8)
    rows["metric_mask"] = [int(i % 5 != 0) for i in range(32)]
    rows["classifier_mask"] = [int(i % 3 != 0 or i % 5 == 0) for i in range(32)]
    return write_rows(tmp_path_factory.mktemp("steps") / "rows.parquet", rows)


def open_tiny(model, rows_path, **training):
    settings = make_settings(model, rows_path, **training)
    return open_session(settings, corpus=load_corpus(settings), checkpoint=None, processes=Processes())


def load(session, window):
    batches = []
    for batch in window.batches:
        share = session.processes.share(batch)
        ids = [session.tokens.ids[row] for row in share.rows]
        batches.append(LoadedBatch(batch, share, pad_rows(ids, padding=session.model.padding)))
    return batches


def gradient(session, window, *, number=0):
    session.model.trained.train()
    session.model.trained.zero_grad(set_to_none=True)
    session.stepper.backward(window, load(session, window), number=number)
    return {
        name: value.grad.clone() for name, value in session.model.trained.named_parameters() if value.grad is not None
    }


def assert_equal(ours, theirs, *, tolerance=2e-6):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=tolerance), name


ROWS = np.arange(32)


def test_the_loss_is_the_weighted_sum_of_both_means(still_encoder, rows_path):  # noqa: F811
    session = open_tiny(still_encoder, rows_path, classification_loss_weight=0.7, metric_loss_weight=1.3)
    ours = gradient(session, Window([[ROWS]]))
    network, targets = session.model.trained, session.stepper.targets
    network.zero_grad(set_to_none=True)
    vectors, logits = session.model.forward(pad_rows(session.tokens.ids, padding=session.model.padding))
    ce = cross_entropy(logits, torch.tensor(targets.classes), torch.tensor(targets.classifier_mask))
    contrast = supcon(vectors, torch.tensor(targets.codes), torch.tensor(targets.metric_mask), temperature=0.1)
    (0.7 * ce.total / ce.n + 1.3 * contrast.total / contrast.n).backward()
    theirs = {name: value.grad for name, value in network.named_parameters() if value.grad is not None}
    assert_equal(ours, theirs)


def test_cross_entropy_accumulated_over_uneven_batches_is_that_of_one_batch(still_encoder, rows_path):  # noqa: F811
    session = open_tiny(still_encoder, rows_path, metric_loss_weight=0.0)
    whole = gradient(session, Window([[ROWS]]))
    parts = gradient(session, Window([[ROWS[:5]], [ROWS[5:20]], [ROWS[20:]]]))
    assert_equal(parts, whole)


def test_supcon_accumulated_is_the_mean_over_the_anchors_of_the_window(still_encoder, rows_path):  # noqa: F811
    session = open_tiny(still_encoder, rows_path, classification_loss_weight=0.0)
    window = Window([[ROWS[:6]], [ROWS[6:20]], [ROWS[20:]]])
    accumulated = gradient(session, window)
    network, targets = session.model.trained, session.stepper.targets
    network.zero_grad(set_to_none=True)
    sums = []
    for batch in window.batches:
        vectors, _ = session.model.forward(
            pad_rows([session.tokens.ids[row] for row in batch], padding=session.model.padding)
        )
        mask = torch.tensor(targets.metric_mask[batch])
        sums.append(supcon(vectors, torch.tensor(targets.codes[batch]), mask, temperature=0.1))
    (sum(part.total for part in sums) / sum(part.n for part in sums)).backward()
    by_hand = {name: value.grad for name, value in network.named_parameters() if value.grad is not None}
    head = {"head.weight", "head.bias"}
    assert_equal({n: g for n, g in accumulated.items() if n in by_hand and n not in head}, by_hand)
    # The control: a contrast set of the whole window is another loss, which accumulation does not give.
    whole = gradient(session, Window([[ROWS]]))
    assert any(not torch.allclose(whole[name], accumulated[name], atol=1e-4) for name in by_hand)


def test_the_gradient_cache_gives_the_gradient_of_the_full_batch(still_encoder, rows_path):  # noqa: F811
    session = open_tiny(still_encoder, rows_path)
    whole = gradient(session, Window([[ROWS]]))
    cached = gradient(session, Window([[ROWS[:8], ROWS[8:19], ROWS[19:]]]))
    assert_equal(cached, whole)


def test_the_gradient_cache_drops_the_same_units_twice(tiny_encoder, rows_path):  # noqa: F811
    """With dropout on: equal to keeping the graphs of all pieces, which is what the cache saves."""
    session = open_tiny(tiny_encoder, rows_path)
    window = Window([[ROWS[:8], ROWS[8:19], ROWS[19:]]])
    cached = gradient(session, window, number=3)
    network, targets, stepper = session.model.trained, session.stepper.targets, session.stepper
    network.zero_grad(set_to_none=True)
    kept = [stepper._forward(batch, (3, index)) for index, batch in enumerate(load(session, window))]
    vectors, logits = torch.cat([k[0] for k in kept]), torch.cat([k[1] for k in kept])
    ce = cross_entropy(logits, torch.tensor(targets.classes), torch.tensor(targets.classifier_mask))
    contrast = supcon(vectors, torch.tensor(targets.codes), torch.tensor(targets.metric_mask), temperature=0.1)
    (ce.total / ce.n + contrast.total / contrast.n).backward()
    theirs = {name: value.grad for name, value in network.named_parameters() if value.grad is not None}
    assert_equal(cached, theirs)
    assert not torch.allclose(cached["head.weight"], gradient(session, window, number=4)["head.weight"])


def test_a_window_without_any_anchor_or_class_row_has_a_gradient_of_zero(still_encoder, rows_path):  # noqa: F811
    session = open_tiny(still_encoder, rows_path)
    lonely = np.array([0, 9])  # two labels, so no anchor
    session.stepper.targets.classifier_mask[lonely] = False
    assert all(not value.any() for value in gradient(session, Window([[lonely]])).values())


def test_the_share_of_anchors_counts_the_rows_of_supcon_alone(still_encoder, rows_path):  # noqa: F811
    session = open_tiny(still_encoder, rows_path)
    window = Window([[np.array([1, 2, 9, 5])]])  # a pair, one of another label, one that SupCon does not read
    metrics = session.stepper.step(window, load(session, window), number=0).metrics
    assert metrics["anchor_share"] == pytest.approx(2 / 3)
    assert metrics["rows"] == 4 and metrics["labels_in_step"] == 2


def two_sets():
    """A window of two contrast sets, one of them in pieces, that two processes cannot share evenly."""
    return Window([[ROWS[:9]], [ROWS[9:16], ROWS[16:]]])


PROGRAM = """
import os, sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification  # once, for both processes
import train_metric_classifier
from tests.test_metric_steps import gradient, load, make_settings, two_sets
from metric_parts.corpus import load_corpus
from metric_parts.parallel import join_processes
from metric_parts.session import open_session
child = os.fork()
os.environ["RANK"] = "0" if child else "1"
processes = join_processes("cpu")
settings = make_settings(sys.argv[1], sys.argv[2])
session = open_session(settings, corpus=load_corpus(settings), checkpoint=None, processes=processes)
window = two_sets()
gradients = gradient(session, window)
vectors = session.stepper.backward(window, load(session, window), number=0).vectors
saved = {"gradients": gradients, "vectors": [torch.from_numpy(v) for v in vectors]}
torch.save(saved, sys.argv[3] + f"/gradients.{processes.rank}")
train_metric_classifier.run(make_settings(*sys.argv[1:3], out=sys.argv[3] + "/two", num_epochs=2))  # leaves at its end
if not child:
    os._exit(0)  # how torch takes itself down is not the question here
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def two_processes(still_encoder, rows_path, tmp_path_factory):  # noqa: F811
    """The folder with what two processes made: the gradients of a window, and a whole run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path_factory.mktemp("two_processes")
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": "."}
    command = [sys.executable, "-c", PROGRAM, str(still_encoder), str(rows_path), str(out)]
    environment = {**os.environ, **both, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return out


def test_two_processes_train_the_model_of_one(two_processes, still_encoder, rows_path, tmp_path):  # noqa: F811
    import train_metric_classifier

    train_metric_classifier.run(make_settings(still_encoder, rows_path, out=tmp_path / "one", num_epochs=2))
    (moments, lines), (shared_moments, shared_lines) = map(trained, (tmp_path / "one", two_processes / "two"))
    assert moments.keys() == shared_moments.keys() and len(lines) == len(shared_lines) == 2
    assert all(torch.allclose(moments[key], shared_moments[key], atol=1e-4) for key in moments)
    for ours, theirs in zip(lines, shared_lines, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert lines[0]["train/loss"] != pytest.approx(lines[1]["train/loss"], rel=1e-3)  # the control


def trained(folder):
    """The means of the gradients over a run, by parameter, and the lines of its record."""
    checkpoint = sorted(folder.glob("step-*"))[-1]
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {key: values["exp_avg"] for key, values in state.items()}, [json.loads(line) for line in lines]


def test_two_processes_give_the_gradients_of_one(two_processes, still_encoder, rows_path):  # noqa: F811
    session, window = open_tiny(still_encoder, rows_path), two_sets()
    alone = gradient(session, window)
    vectors = session.stepper.backward(window, load(session, window), number=0).vectors
    for rank in (0, 1):
        shared = torch.load(two_processes / f"gradients.{rank}")
        assert_equal(shared["gradients"], alone)
        assert all(np.allclose(a.numpy(), b, atol=1e-6) for a, b in zip(shared["vectors"], vectors, strict=True))
    # The control: what one of the two has of the batches gives another gradient, also when it is doubled.
    half = gradient(session, Window([[batch[::2] for batch in batches] for batches in window.contrast_sets]))
    for factor in (1, 2):
        assert any(not torch.allclose(factor * half[name], alone[name], atol=1e-4) for name in alone)


# --- Optimizer and schedule ------------------------------------------------------------------------------------------


def test_biases_and_norms_do_not_decay_and_the_head_has_its_own_rate(still_encoder, rows_path):  # noqa: F811
    settings = make_settings(still_encoder, rows_path)
    values = {**settings.model_dump(), "optimizer": {"learning_rate": 1e-4, "head_learning_rate": 1e-2}}
    settings = settings_from_values(TrainerSettings, values, source="test")
    model = load_model(str(still_encoder), settings=settings, classes=["a", "b"], device="cpu")
    groups = {
        (group["lr"], group["weight_decay"]): group["params"]
        for group in make_optimizer(model, settings=settings).param_groups
    }
    assert set(groups) == {(1e-4, 0.01), (1e-4, 0.0), (1e-2, 0.01), (1e-2, 0.0)}
    assert all(parameter.ndim == 1 for parameter in groups[1e-4, 0.0])
    assert [parameter.shape[0] for parameter in groups[1e-2, 0.01]] == [2]


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ({"name": "linear", "warmup_steps": 0.2}, [0.0, 0.5, 1.0, 0.875, 0.75]),
        ({"name": "linear", "warmup_steps": 2}, [0.0, 0.5, 1.0, 0.875, 0.75]),
        ({"name": "linear", "warmup_steps": 0, "num_training_steps": 4}, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ({"name": "constant", "warmup_steps": 0}, [1.0] * 5),
        ({"name": "cosine", "warmup_steps": 0, "num_cycles": 1.0, "num_training_steps": 4}, [1.0, 0.5, 0.0, 0.5, 1.0]),
    ],
)  # fmt: skip
def test_schedules_are_those_of_transformers(scheduler, rates):
    values = {"data": {"parquet_path": "x"}, "scheduler": scheduler}
    settings = settings_from_values(TrainerSettings, values, source="test")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, settings=settings, n_steps=10)
    seen = []
    for _ in rates:
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx(rates)


def test_a_loss_that_stays_not_finite_ends_the_run(still_encoder, rows_path, monkeypatch):  # noqa: F811
    from common.config import UserError

    session = open_tiny(still_encoder, rows_path)
    with torch.no_grad():
        session.model.head.weight.fill_(float("nan"))
    window = Window([[ROWS[:8]]])
    for number in range(19):
        assert session.stepper.step(window, load(session, window), number=number).was_skipped
    with pytest.raises(UserError, match=r"has not been finite for 20 steps; lower optimizer\.learning_rate"):
        session.stepper.step(window, load(session, window), number=19)


@pytest.mark.parametrize(
    ("asked", "precision", "reason"),
    [
        ("flash_attention_2", "no", "it needs mixed_precision bf16 or fp16"),
        ("flash_attention_2", "bf16", ""),  # as transformers says it
        ("flex_attention", "no", "torch has its backward pass for CUDA alone"),
    ],
)
def test_an_attention_that_cannot_run_falls_back_with_a_word(
    still_encoder,  # noqa: F811
    rows_path,
    caplog,
    asked,
    precision,
    reason,
):
    session = open_tiny(still_encoder, rows_path, attention_implementation=asked, mixed_precision=precision)
    assert session.model.network.config._attn_implementation == "sdpa"
    assert f"attention {asked} cannot run here ({reason}" in caplog.text
    window = Window([[ROWS[:8]]])
    assert np.isfinite(session.stepper.step(window, load(session, window), number=0).metrics["loss"])

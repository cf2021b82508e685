"""The whole script on a tiny model: what it writes, how it goes on after a kill, and what it refuses."""

import csv
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import train_metric_classifier
from common.config import ConfigError, UserError, settings_from_values
from metric_parts.model import pad_rows
from metric_parts.settings import TrainerSettings
from metric_parts.windows import LoadedBatch
from tests.tiny_encoder import tiny_encoder, training_rows, write_rows  # noqa: F401  fixtures

EXAMPLE = "metric_classifier_training.example.yaml"


def make_values(folder, model, **changes):
    values = {
        "model_name": str(model),
        "pooling": "cls",
        "progress": False,
        "curves": False,
        "data": {"parquet_path": str(folder / "rows.parquet"), "val_ratio": 0.2},
        "training": {
            "batch_size": 12, "num_epochs": 2, "max_seq_length": 32, "log_every_n_steps": 3,
            "gradient_accumulation_steps": 1,
        },
        "optimizer": {"learning_rate": 0.003},
        "checkpointing": {"checkpoints_dir": str(folder / "out"), "save_every_n_bathces": 3},
        "metric_validation": {"keep_last_n_emb_steps": 5, "every_n_batches": 5},
    }  # fmt: skip
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    return values


def make_settings(folder, model, **changes):
    return settings_from_values(TrainerSettings, make_values(folder, model, **changes), source="test")


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "rows.parquet", training_rows())
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_encoder):  # noqa: F811
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    write_rows(folder / "rows.parquet", training_rows())
    test_rows = training_rows(n_per_class=4, seed=9)
    write_rows(folder / "test.parquet", {"text": test_rows["text"], "label": test_rows["label"]})
    settings = make_settings(
        folder,
        tiny_encoder,
        pooling="mean",
        curves=True,
        data__test_parquet_path=str(folder / "test.parquet"),
        tensorboard={"enabled": True},
        training__num_epochs=3,
    )
    result = train_metric_classifier.run(settings)
    return folder, settings, result


# --- What it writes --------------------------------------------------------------------------------------------------


def test_the_record_the_summary_and_the_pictures_are_always_written(finished):
    folder, _, result = finished
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    names = set().union(*lines)
    assert lines[0]["step"] == 0 and {"val/frozen_knn_acc", "val/frozen_lr_f1"} <= set(lines[0])
    assert {"train/loss", "train/cross_entropy", "train/supcon", "train/anchor_share", "train/learning_rate"} <= names
    assert {"val/loss", "val/acc", "val/f1", "val/recall@1", "val/recall@10", "val/knn_f1"} <= names
    assert {"bank/rows", "bank/unique_rows", "bank/labels_covered", "bank/age_steps", "bank/drift"} <= names
    assert {"bank/intra_cosine", "bank/inter_cosine", "bank/effective_rank"} <= names
    assert all(line.get("train/anchor_share", 1) == 1 for line in lines)
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["result"] == result and result["best"].endswith("out/best")
    assert set(summary["frozen"]) == {"val", "test"} and set(result) >= {"test_acc", "frozen_knn_acc", "frozen_lr_acc"}
    confusion = read_confusion(folder / "out", summary["labels"]["classes"])  # two texts of each class are held out
    assert confusion.sum(axis=1).tolist() == [2] * 6 and summary["rows"]["validation"] == 12
    assert np.trace(confusion) / 12 == pytest.approx(summary["validation"]["acc"])
    for name in ("loss", "accuracy", "macro_f1", "retrieval", "bank", "confusion"):
        assert (folder / "out" / "curves" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "out" / "tensorboard").glob("events.*"))


def read_confusion(out, classes):
    """True classes in rows, predicted ones in columns."""
    header, *rows = csv.reader((out / "confusion.csv").read_text(encoding="utf-8").splitlines())
    assert header[1:] == [row[0] for row in rows] == classes
    return np.array([row[1:] for row in rows], int)


def test_every_metric_is_explained_on_the_page(finished):
    folder, _, _ = finished
    page = pathlib.Path("docs/train_metric_classifier.md").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    names = {re.sub(r"@\d+", "@K", name) for name in set().union(*lines)}
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_the_best_checkpoint_loads_in_transformers_with_its_labels(finished):
    from transformers import pipeline

    folder, _, result = finished
    classify = pipeline("text-classification", model=str(folder / "out" / "best"), device="cpu")
    rows = training_rows(n_per_class=4, seed=9)
    predicted = [answer["label"] for answer in classify(rows["text"])]
    assert set(predicted) <= set(rows["label"])
    accuracy = np.mean([a == b for a, b in zip(predicted, rows["label"], strict=True)])
    # It knows the architecture's own head alone, which is fitted to answer as ours does.
    assert accuracy == pytest.approx(result["test_acc"], abs=0.05)


def test_the_own_head_of_the_architecture_answers_as_ours_and_says_how_often(finished):
    from metric_parts.own_head import fit_own_head

    folder, settings, _ = finished
    agreement = json.loads((folder / "out" / "summary.json").read_text())["own_head_agreement"]
    assert agreement >= 0.9
    model = load_again(folder, settings)
    texts = training_rows(n_per_class=20, seed=9)["text"]
    tokens = model.tokenize(texts)
    rolled = model.head.weight.detach().roll(1, dims=0)  # the control: our head names other classes
    with torch.no_grad():
        model.head.weight.copy_(rolled)
    logits = torch.tensor(model.encode(tokens).logits)
    before = model.network.classifier.weight.detach().clone()
    assert fit_own_head(model, tokens, seed=0) >= 0.9
    assert not torch.allclose(before, model.network.classifier.weight, atol=1e-2)
    own = [model.network.eval()(torch.tensor(ids[None].astype("int64"))).logits[0] for ids in tokens.ids]
    assert (torch.stack(own).argmax(dim=1) == logits.argmax(dim=1)).float().mean() >= 0.9


def test_a_new_head_starts_from_the_regression_on_the_frozen_vectors(folder, tiny_encoder):  # noqa: F811
    from metric_parts.corpus import load_corpus
    from metric_parts.parallel import Processes
    from metric_parts.session import open_session

    answers = {}
    for start in ("regression", "random"):
        settings = make_settings(folder, tiny_encoder, training__head_start=start)
        session = open_session(settings, corpus=load_corpus(settings), checkpoint=None, processes=Processes())
        encoded = session.model.encode(session.tokens)
        answers[start] = encoded.logits.argmax(axis=1)
        theirs = session.probe.regression.predict(
            encoded.vectors / np.linalg.norm(encoded.vectors, axis=1, keepdims=True)
        )
    assert np.mean(answers["regression"] == theirs) >= 0.95
    assert np.mean(answers["random"] == theirs) <= 0.6


def test_the_best_checkpoint_is_what_stage_one_reads(finished):
    from common.encoder import load_encoder

    folder, settings, _ = finished
    encoder = load_encoder(str(folder / "out" / "best"), head="auto")
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert encoder.classes == summary["labels"]["classes"] and encoder.pooling == "mean"
    texts = training_rows(n_per_class=3, seed=9)["text"]
    encoded = encoder.encode(texts)
    assert np.allclose(encoded.probs.sum(axis=1), 1, atol=1e-5)
    model = load_again(folder, settings)
    ours = model.encode(model.tokenize(texts))
    assert np.allclose(encoded.vectors, ours.vectors, atol=1e-5)
    assert np.allclose(encoded.probs, torch.softmax(torch.from_numpy(ours.logits), dim=1).numpy(), atol=1e-5)


def test_whoever_may_read_the_folder_may_read_the_model(finished):
    folder, _, _ = finished
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder / "out" / "best").glob("*.*")}
    assert len(set(modes.values())) == 1, modes


def load_again(folder, settings):
    from metric_parts.pretrained import load_model

    classes = json.loads((folder / "out" / "summary.json").read_text())["labels"]["classes"]
    return load_model(str(folder / "out" / "best"), settings=settings, classes=classes, device="cpu")


def test_the_encoder_of_the_best_checkpoint_loads_in_sentence_transformers(finished):
    from sentence_transformers import SentenceTransformer

    folder, settings, _ = finished
    texts = training_rows(n_per_class=3, seed=9)["text"]
    theirs = SentenceTransformer(str(folder / "out" / "best"), device="cpu").encode(texts)
    model = load_again(folder, settings)
    assert np.allclose(theirs, model.encode(model.tokenize(texts)).vectors, atol=1e-5)


def test_the_vector_of_the_pooler_is_the_same_in_sentence_transformers(folder, tiny_encoder):  # noqa: F811
    from sentence_transformers import SentenceTransformer

    settings = make_settings(folder, tiny_encoder, pooling="pooler", training__num_epochs=1)
    train_metric_classifier.run(settings)
    texts = training_rows(n_per_class=2, seed=9)["text"]
    model = load_again(folder, settings)
    theirs = SentenceTransformer(str(folder / "out" / "best"), device="cpu").encode(texts)
    assert np.allclose(theirs, model.encode(model.tokenize(texts)).vectors, atol=1e-5)


def test_a_finished_run_says_so_and_does_nothing(finished, caplog):
    folder, settings, result = finished
    before = (folder / "out" / "summary.json").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        assert train_metric_classifier.run(settings) == result
    assert "is finished and nothing has changed" in caplog.text
    assert (folder / "out" / "summary.json").stat().st_mtime_ns == before


def test_the_next_round_keeps_a_head_of_the_same_classes_and_replaces_any_other(finished):
    from metric_parts.pretrained import load_model

    folder, settings, _ = finished
    best = str(folder / "out" / "best")
    model = load_again(folder, settings)
    classes = list(model.network.config.id2label.values())
    other = load_model(best, settings=settings, classes=[*classes[:-1], "new"], device="cpu")
    more = load_model(best, settings=settings, classes=[*classes, "new"], device="cpu")
    for fresh in (other, more):
        assert fresh.network.config.id2label[len(fresh.network.config.id2label) - 1] == "new"
        assert fresh.has_new_head and not model.has_new_head
        assert not torch.equal(fresh.head.weight[:5], model.head.weight[:5])
        encoder = fresh.network.base_model.embeddings.word_embeddings.weight
        assert torch.equal(encoder, model.network.base_model.embeddings.word_embeddings.weight)


# --- Going on after a kill -------------------------------------------------------------------------------------------

KILLS = """
import json, os, sys
import torch
torch.set_num_threads(1)
from common.config import settings_from_values
from metric_parts.settings import TrainerSettings
import train_metric_classifier, metric_parts.session, metric_parts.evaluation, metric_parts.report  # before the forks
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

def in_child(values, *, at=None, what="fsync"):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen, real = [0], getattr(os, what)
    def counted(*arguments, **options):
        seen[0] += 1
        if seen[0] == at:
            os._exit(9)  # no handler runs, as for SIGKILL
        return real(*arguments, **options)
    setattr(os, what, counted)
    try:
        train_metric_classifier.run(settings_from_values(TrainerSettings, values, source="test"))
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

values = json.loads(sys.argv[1])
for number, at in enumerate(json.loads(sys.argv[2])):
    values["checkpointing"]["checkpoints_dir"] = f"{sys.argv[3]}/out{number}"
    codes = [in_child(values, at=kill) for kill in at] + [in_child(values)]
    assert codes == [9] * len(at) + [0], (at, codes)
"""


def weights_of(checkpoint):
    from safetensors.torch import load_file

    return load_file(checkpoint / "model.safetensors")


def test_a_run_killed_anywhere_and_resumed_is_one_that_was_not(folder, tiny_encoder):  # noqa: F811
    values = make_values(folder, tiny_encoder, training__gradient_accumulation_steps=2, training__batch_size=6)
    kills = [[], [8], [37], [45, 25]]
    command = [sys.executable, "-c", KILLS, json.dumps(values), json.dumps(kills), str(folder)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    whole = folder / "out0"
    last = sorted(whole.glob("step-*"))[-1]
    for number in range(1, len(kills)):
        other = folder / f"out{number}"
        for name in ("metrics.jsonl", "confusion.csv"):
            assert (other / name).read_bytes() == (whole / name).read_bytes(), kills[number]
        assert [path.name for path in sorted(other.glob("step-*"))] == [
            path.name for path in sorted(whole.glob("step-*"))
        ]
        assert (other / "best").resolve().name == (whole / "best").resolve().name
        assert (other / last.name / "state.json").read_bytes() == (last / "state.json").read_bytes()
        for name, value in weights_of(last).items():
            assert torch.equal(weights_of(other / last.name)[name], value), name
        assert not list(other.glob(".unfinished-*"))
        summaries = [json.loads((path / "summary.json").read_text()) for path in (whole, other)]
        for summary in summaries:
            del summary["speed"], summary["result"]["best"]
        assert summaries[0] == summaries[1]


def test_a_resume_that_forgot_the_optimizer_would_be_seen(half_done, tiny_encoder, monkeypatch):  # noqa: F811
    """The control of the test of kills: what it compares differs where a resume is wrong."""
    from metric_parts.steps import Stepper

    twin = half_done / "twin"
    shutil.copytree(half_done / "out", twin, symlinks=True)
    train_metric_classifier.run(make_settings(half_done, tiny_encoder))
    monkeypatch.setattr(Stepper, "load_state_dict", lambda self, state: None)
    train_metric_classifier.run(make_settings(half_done, tiny_encoder, checkpointing__checkpoints_dir=str(twin)))
    right, wrong = ((path / "metrics.jsonl").read_bytes() for path in (half_done / "out", twin))
    assert right[:200] == wrong[:200] and right != wrong


@pytest.fixture
def half_done(folder, tiny_encoder, monkeypatch):  # noqa: F811
    """A run that was interrupted in its second epoch, with two checkpoints."""
    from metric_parts.bank import Bank

    settings = make_settings(folder, tiny_encoder)
    real = Bank.add

    def interrupt(self, rows, vectors, *, step):
        if step == 7:
            raise KeyboardInterrupt
        real(self, rows, vectors, step=step)

    with monkeypatch.context() as patch:
        patch.setattr(Bank, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_metric_classifier.run(settings)
    assert [path.name for path in sorted((folder / "out").glob("step-*"))] == ["step-00000003", "step-00000006"]
    return folder


def test_a_checkpoint_cut_in_half_is_passed_over(half_done, tiny_encoder, caplog):  # noqa: F811
    broken = half_done / "out" / "step-00000006" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    with caplog.at_level("INFO"):
        train_metric_classifier.run(make_settings(half_done, tiny_encoder))
    assert "step-00000006 is damaged: model.safetensors is not what was written" in caplog.text
    assert "going on from" in caplog.text and "step-00000003: step 3" in caplog.text


def test_a_damaged_checkpoint_asked_for_by_name_is_refused(half_done, tiny_encoder):  # noqa: F811
    asked = half_done / "out" / "step-00000006"
    optimizer = bytearray((asked / "optimizer.pt").read_bytes())
    optimizer[100] ^= 1
    (asked / "optimizer.pt").write_bytes(optimizer)
    with pytest.raises(UserError, match=r"step-00000006 is damaged: optimizer\.pt"):
        train_metric_classifier.run(make_settings(half_done, tiny_encoder, training__resume_from=str(asked)))


def test_when_every_checkpoint_is_damaged_nothing_is_thrown_away(half_done, tiny_encoder):  # noqa: F811
    for state in (half_done / "out").glob("step-*/state.json"):
        state.write_text("{")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged; start with --overwrite"):
        train_metric_classifier.run(make_settings(half_done, tiny_encoder))
    assert (half_done / "out" / "best" / "model.safetensors").is_file()


def test_overwriting_deletes_nothing_that_a_run_did_not_write(half_done, tiny_encoder):  # noqa: F811
    (half_done / "out" / "notes.txt").write_text("mine")
    (half_done / "out" / "thesis").mkdir()
    train_metric_classifier.run(make_settings(half_done, tiny_encoder, training__num_epochs=1), overwrite=True)
    assert (half_done / "out" / "notes.txt").read_text() == "mine" and (half_done / "out" / "thesis").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__num_epochs": 3}, r"training\.num_epochs: 2 -> 3"),
        ({"optimizer__learning_rate": 0.1}, r"optimizer\.learning_rate: 0\.003 -> 0\.1"),
        ({"training__resume_from": None}, r"holds a run and training\.resume_from is null"),
    ],
)
def test_another_configuration_does_not_go_on(half_done, tiny_encoder, changes, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        train_metric_classifier.run(make_settings(half_done, tiny_encoder, **changes))


def test_other_labels_do_not_go_on_but_may_overwrite(half_done, tiny_encoder):  # noqa: F811
    rows = training_rows()
    rows["label"] = ["renamed" if label == "lose_card" else label for label in rows["label"]]
    write_rows(half_done / "rows.parquet", rows)
    settings = make_settings(half_done, tiny_encoder)
    with pytest.raises(UserError, match="classes: .*parquet_path itself changed since"):
        train_metric_classifier.run(settings)
    assert train_metric_classifier.run(settings, overwrite=True)["best"]


def test_trackers_and_paces_of_saving_may_change_on_the_way(half_done, tiny_encoder):  # noqa: F811
    settings = make_settings(
        half_done, tiny_encoder, checkpointing__save_every_n_bathces=2, tensorboard={"enabled": True}
    )
    assert train_metric_classifier.run(settings)["best"]


def test_a_full_disk_costs_no_checkpoint(half_done, tiny_encoder):  # noqa: F811
    """A limit on the size of files stands for the disk: the kernel refuses the write just so."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = {path.name: path.stat().st_mtime_ns for path in (half_done / "out").glob("step-*")}
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(OSError) as refused:
            train_metric_classifier.run(make_settings(half_done, tiny_encoder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused.value.errno == 27  # EFBIG
    assert {path.name: path.stat().st_mtime_ns for path in (half_done / "out").glob("step-*")} == kept
    assert not list((half_done / "out").glob(".unfinished-*"))
    assert train_metric_classifier.run(make_settings(half_done, tiny_encoder))["best"]


def test_a_folder_with_a_dot_in_its_name_is_held_from_within(folder, tiny_encoder):  # noqa: F811
    from common.commit import LockHeld, OutputLock

    settings = make_settings(folder, tiny_encoder, checkpointing__checkpoints_dir=str(folder / "v1.5"))
    with OutputLock(folder / "v1.5", is_file=False), pytest.raises(LockHeld):
        train_metric_classifier.run(settings)


def test_a_file_where_the_checkpoints_should_go_is_refused_by_name(folder, tiny_encoder):  # noqa: F811
    settings = make_settings(folder, tiny_encoder, checkpointing__checkpoints_dir=str(folder / "rows.parquet"))
    with pytest.raises(UserError, match=r"output folder .*rows\.parquet cannot be made: a file of that name"):
        train_metric_classifier.run(settings)
    assert sorted(path.name for path in folder.iterdir()) == ["rows.parquet"]


def test_two_runs_at_once_on_one_output(half_done, tiny_encoder):  # noqa: F811
    from common.commit import LockHeld, OutputLock

    with OutputLock(half_done / "out"), pytest.raises(LockHeld):
        train_metric_classifier.run(make_settings(half_done, tiny_encoder))


# --- Ways of training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"training__gradient_cache": True, "training__gradient_accumulation_steps": 3},
        {"training__mixed_precision": "bf16"},
        {"data__val_ratio": 0.0},
        {"data__upsample": True, "training__metric_loss_weight": 0.0},
        {"metric_validation__distance": "l2", "metric_validation__knn_k": 999, "checkpointing__save_best_by": "loss"},
    ],
)
def test_each_way_of_training_comes_to_its_end(folder, tiny_encoder, changes):  # noqa: F811
    settings = make_settings(folder, tiny_encoder, training__num_epochs=1, **changes)
    result = train_metric_classifier.run(settings)
    assert (folder / "out" / "best" / "model.safetensors").is_file()
    assert result["step"] >= 1


def test_bfloat16_is_for_the_encoder_alone(folder, tiny_encoder):  # noqa: F811
    from metric_parts.corpus import load_corpus
    from metric_parts.parallel import Processes
    from metric_parts.session import open_session

    vectors, losses = {}, {}
    for precision in ("no", "bf16"):
        settings = make_settings(folder, tiny_encoder, training__mixed_precision=precision)
        session = open_session(settings, corpus=load_corpus(settings), checkpoint=None, processes=Processes())
        batch = pad_rows(session.tokens.ids[:12], padding=session.model.padding)
        vectors[precision], logits = session.model.forward(batch)
        assert vectors[precision].dtype == logits.dtype == torch.float32
        assert all(parameter.dtype == torch.float32 for parameter in session.model.trained.parameters())
        window = session.windows(0)[0]
        share = session.processes.share(window.batches[0])
        tokens = pad_rows([session.tokens.ids[row] for row in share.rows], padding=session.model.padding)
        losses[precision] = session.stepper.step(
            window, [LoadedBatch(window.batches[0], share, tokens)], number=0
        ).metrics["loss"]
    difference = (vectors["no"] - vectors["bf16"]).abs().max().item()
    assert 1e-5 < difference < 0.1  # the control: the encoder did compute in bfloat16
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.02)


def test_workers_do_not_change_the_numbers(folder, tiny_encoder):  # noqa: F811
    records = []
    for n in (0, 2):
        out = str(folder / f"workers{n}")
        settings = make_settings(folder, tiny_encoder, data__num_workers=n, checkpointing__checkpoints_dir=out)
        train_metric_classifier.run(settings)
        records.append((folder / f"workers{n}" / "metrics.jsonl").read_bytes())
    assert records[0] == records[1]


def test_training_on_rows_for_the_metric_alone_and_for_the_head_alone(folder, tiny_encoder, caplog):  # noqa: F811
    rows = training_rows()
    rows["classifier_mask"] = [int(i % 10 < 5) for i in range(60)]
    rows["metric_mask"] = [int(i % 10 >= 3) for i in range(60)]
    rows["label"][-5:] = ["only_metric"] * 5
    write_rows(folder / "rows.parquet", rows)
    with caplog.at_level("INFO"):
        train_metric_classifier.run(make_settings(folder, tiny_encoder, data__val_ratio=0.3))
    assert "7 labels, 6 of them classes of the head" in caplog.text
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert "only_metric" in summary["labels"]["names"] and "only_metric" not in summary["labels"]["classes"]


@pytest.mark.parametrize(
    "numbers", [[10, 9, 8, 7, 6, 5], [10.0, 9.0, 8.0, 7.0, 6.0, 5.0], ["10", "9", "8", "b", "a", "5"]]
)
def test_labels_of_any_type_are_in_the_checkpoint(folder, tiny_encoder, numbers):  # noqa: F811
    rows = training_rows()
    names = sorted(set(rows["label"]))
    rows["label"] = [numbers[names.index(label)] for label in rows["label"]]
    write_rows(folder / "rows.parquet", rows)
    train_metric_classifier.run(make_settings(folder, tiny_encoder, data__val_ratio=0.0, training__num_epochs=1))
    known = json.loads((folder / "out" / "best" / "config.json").read_text())["id2label"]
    expected = ["10", "5", "8", "9", "a", "b"] if "a" in numbers else ["5", "6", "7", "8", "9", "10"]
    assert list(known.values()) == expected


def test_texts_that_are_too_long_are_cut_and_counted(folder, tiny_encoder, caplog):  # noqa: F811
    rows = training_rows()
    rows["text"][0] = "card " * 500
    write_rows(folder / "rows.parquet", rows)
    train_metric_classifier.run(make_settings(folder, tiny_encoder, data__val_ratio=0.0, training__num_epochs=1))
    assert "train: 1 text is longer than 32 tokens and cut" in caplog.text


def test_a_class_that_only_validation_has_is_counted_not_scored(folder, tiny_encoder, caplog):  # noqa: F811
    valid = training_rows(n_per_class=3, seed=4)
    valid["label"][0] = "unheard"
    write_rows(folder / "valid.parquet", valid)
    settings = make_settings(
        folder, tiny_encoder, data__valid_parquet_path=str(folder / "valid.parquet"), training__num_epochs=1
    )
    train_metric_classifier.run(settings)
    assert "validation: 1 rows of 1 labels that no training row with classifier_mask=1 has (unheard" in caplog.text
    assert read_confusion(folder / "out", sorted(set(training_rows()["label"]))).sum() == 17


# --- Trackers --------------------------------------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed_or_fails_warns_once_and_training_goes_on(
    folder,
    tiny_encoder,  # noqa: F811
    caplog,
    monkeypatch,
):
    from torch.utils.tensorboard import SummaryWriter

    def full(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    monkeypatch.setitem(sys.modules, "neptune", None)  # as if it were not installed
    settings = make_settings(folder, tiny_encoder, tensorboard={"enabled": True}, neptune={"enabled": True})
    assert train_metric_classifier.run(settings)["best"]
    warnings = [record.message for record in caplog.records if "switched off" in record.message]
    assert len(warnings) == 2
    assert any("pip install neptune" in text for text in warnings)
    assert any("tensorboard" in text and "no space left" in text for text in warnings)


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_neptune_online_is_refused_with_the_reason(mode):
    with pytest.raises(
        ConfigError, match="closed on 2026-03-05; set mode: offline or debug, or use tensorboard or mlflow"
    ):
        settings_from_values(TrainerSettings, {"data": {"parquet_path": "x"}, "neptune": {"mode": mode}}, source="test")


# --- Config and command line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": {"batch_sise": 3}}, r"training\.batch_sise: no such key; did you mean 'batch_size'\?"),
        ({"trainning": {}}, "trainning: no such key; did you mean 'training'"),
        ({"training": {"supcon_temperature": 0}}, r"training\.supcon_temperature: input should be greater than 0"),
        ({"data": {"upsample": True, "downsample": True, "parquet_path": "x"}}, "upsample and downsample exclude"),
        ({"training": {"batch_size": 4, "samples_per_class": 4}}, "samples_per_class must be below batch_size"),
        ({"metric_validation": {"recall_at_k": [0]}}, "every K must be 1 or more"),
        (
            {"checkpointing": {"save_every_n_bathces": 3, "save_every_n_batches": 3}},
            "save_every_n_bathces and save_every_n_batches are one key",
        ),
    ],
)
def test_mistakes_in_the_config_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        settings_from_values(TrainerSettings, {"data": {"parquet_path": "x"}, **values}, source="test")


def test_both_spellings_of_save_every_n_batches_are_understood():
    for name in ("save_every_n_bathces", "save_every_n_batches"):
        values = {"data": {"parquet_path": "x"}, "checkpointing": {name: 7}}
        settings = settings_from_values(TrainerSettings, values, source="test")
        assert settings.checkpointing.save_every_n_bathces == 7


def script(*arguments):
    return subprocess.run([sys.executable, "train_metric_classifier.py", *arguments], capture_output=True, text=True)


def test_the_example_config_is_checked_from_the_shell_and_nothing_is_written(folder, tiny_encoder):  # noqa: F811
    overrides = (f"data.parquet_path={folder / 'rows.parquet'}", f"checkpointing.checkpoints_dir={folder / 'out'}")
    done = script("--config", EXAMPLE, "--check", *overrides)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["train_rows"] == 54 and plan["validation_rows"] == 6 and plan["classes"] == 6
    assert not (folder / "out").exists()


def test_a_missing_input_is_one_line_on_stderr():
    done = script("--config", EXAMPLE, "data.parquet_path=/nowhere/rows.parquet", "--check")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: /nowhere/rows.parquet does not exist; run cluster_update_dataset.py first" in done.stderr


def test_importing_the_script_loads_nothing_heavy():
    heavy = ("torch", "transformers", "sklearn", "matplotlib")
    code = f"import sys, train_metric_classifier; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.soak
def test_torchrun_with_two_processes_trains_as_one(folder, tmp_path):
    from tests.tiny_encoder import save_tiny_encoder

    still = save_tiny_encoder(tmp_path / "still", dropout=0.0)
    values = make_values(folder, still, training__num_epochs=1)
    train_metric_classifier.run(settings_from_values(TrainerSettings, values, source="test"))
    config = folder / "config.yaml"
    config.write_text(json.dumps(values))  # JSON is YAML
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = (*torchrun, "train_metric_classifier.py", "--config", str(config))
    done = subprocess.run([*command, f"checkpointing.checkpoints_dir={folder / 'two'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (sorted((folder / name).glob("step-*"))[-1] for name in ("out", "two"))
    assert one.name == two.name
    theirs = weights_of(two)
    for name, value in weights_of(one).items():
        # The architecture's own head is fitted by ridge on few rows: small differences of the vectors come out larger.
        assert torch.allclose(theirs[name], value, atol=1e-2 if name.startswith("classifier") else 1e-4), name
    shutil.rmtree(folder / "two")


@pytest.mark.parametrize(("n_processes", "exit_code"), [("2", 3), ("1", -6)])
def test_one_of_several_processes_ends_without_what_would_abort_it(n_processes, exit_code):
    """What aborts here stands for a thread of torch; a process alone, the control, runs into it."""
    code = (
        "import atexit, os; from train_metric_classifier import end_process; atexit.register(os.abort)\n"
        "print('the last line', end=''); end_process(3)"
    )
    environment = {**os.environ, "WORLD_SIZE": n_processes}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == exit_code
    assert done.stdout == "the last line"

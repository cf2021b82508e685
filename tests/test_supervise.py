"""Stage 1 through its main: which rows get a vector, whose probabilities, and what is carried along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.columns import read_vectors
from tests.stage_runner import read_folder, run_stage, write_parquet
from tests.tiny_encoder import CLASSES, save_classifier, save_tiny_encoder

SCRIPT = "cluster_supervise"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("model"), dropout=0.0)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture
def supervise(tmp_path, model):
    """Run stage 1 on an input; the shards lie in `tmp_path / "out"`."""

    def call(input_path: Path, *arguments: str, **values):
        own = {"model_name_or_path": str(model), "input_parquet": str(input_path), "output_dir": str(tmp_path / "out")}
        return run_stage(SCRIPT, tmp_path, own | values, *arguments)

    return call


def done(tmp_path) -> pa.Table:
    return read_folder(tmp_path / "out")


def success(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "_SUCCESS").read_text())


TEXTS = ["lose my card", None, "", "  \n\t", "pay the bill now", "\0", "open account", None]
REASONS = [None, "text is null", "text is empty", "text is empty", None, None, None, "text is null"]


# --- Texts that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 3, 8, 20])
def test_unusable_texts_stay_in_their_rows_with_a_reason(tmp_path, supervise, num_shards):
    path = write_parquet(tmp_path / "in.parquet", {"row": list(range(8)), "text": TEXTS})
    result = supervise(path, num_shards=num_shards, batch_size=2)
    assert result.last_line == str(tmp_path / "out")
    found = done(tmp_path)
    assert found["row"].to_pylist() == list(range(8))
    assert found["text"].to_pylist() == TEXTS
    assert found["error"].to_pylist() == REASONS
    assert [value is None for value in found["cls"].to_pylist()] == [reason is not None for reason in REASONS]
    assert success(tmp_path)["totals"]["errors"] == {"text is empty": 2, "text is null": 2}
    assert len(success(tmp_path)["shards"]) == min(num_shards, 8)
    assert "rows in 8, rows out 8, of them without a result 4" in result.stderr


def test_vectors_are_those_of_their_own_rows(tmp_path, supervise, model):
    from common.encoder import load_encoder

    path = write_parquet(tmp_path / "in.parquet", {"text": TEXTS})
    supervise(path, num_shards=2, batch_size=1)
    read = read_vectors(done(tmp_path)["cls"], where="cls")
    expected = load_encoder(str(model)).encode(
        [text for text, reason in zip(TEXTS, REASONS, strict=True) if not reason]
    )
    assert np.abs(read.vectors[read.valid] - expected.vectors).max() < 1e-5


@pytest.mark.parametrize("values", [[1, 2, None], [1.5, 2.0, None], [True, False, None], [["a"], ["b"], None]])
def test_texts_that_are_no_strings(tmp_path, supervise, values):
    supervise(write_parquet(tmp_path / "in.parquet", {"text": values}))
    found = done(tmp_path)
    kind = type(values[0]).__name__
    assert found["error"].to_pylist() == [f"text is {kind}, not a string"] * 2 + ["text is null"]
    assert found["cls"].null_count == 3


def test_long_and_strange_texts(tmp_path, supervise):
    texts = ["card " * 20_000, "x" * 100_000, "a\0b", "\U0001f4b3\u200d", "\u202egnp.exe", "<script>alert(1)</script>"]
    result = supervise(write_parquet(tmp_path / "in.parquet", {"text": texts}))
    found = done(tmp_path)
    assert found["text"].to_pylist() == texts
    assert found["truncated"].to_pylist() == [True, True, False, False, False, False]
    assert found["cls"].null_count == 0
    assert success(tmp_path)["totals"]["truncated"] == 2
    assert "truncated 2;" in result.stderr


def test_all_texts_unusable(tmp_path, supervise):
    result = supervise(write_parquet(tmp_path / "in.parquet", {"text": [None, ""], "label": ["a", "b"]}))
    assert result.exit_code == 0
    assert done(tmp_path)["cls"].null_count == 2
    assert done(tmp_path)["probs"].null_count == 2
    assert "no labels in the input" in result.stderr  # none on a row with a vector


def test_one_row(tmp_path, supervise):
    supervise(write_parquet(tmp_path / "in.parquet", {"text": ["pay"]}), num_shards=4)
    assert done(tmp_path).num_rows == 1


# --- Probabilities ---------------------------------------------------------------------------------------------------


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_prototypes_by_hand(tmp_path, supervise, temperature):
    texts = ["pay bill", "pay my bill", "lose card", "lose the card", "open account", None]
    labels = ["bill", "bill", "card", " card ", None, "ghost"]
    path = write_parquet(tmp_path / "in.parquet", {"text": texts, "label": labels})
    result = supervise(path, num_shards=3, prototype_temperature=temperature)
    found = done(tmp_path)
    vectors = unit(read_vectors(found["cls"].slice(0, 5), where="cls").vectors.astype(float))
    centers = unit(np.array([vectors[0] + vectors[1], vectors[2] + vectors[3]]))
    scores = np.exp(vectors @ centers.T / temperature)
    expected = scores / scores.sum(axis=1, keepdims=True)
    assert np.abs(read_vectors(found["probs"].slice(0, 5), where="probs").vectors - expected).max() < 1e-4
    assert found["prediction"].to_pylist()[:5] == [["bill", "card"][index] for index in expected.argmax(axis=1)]
    assert found["probs"][5].as_py() is None and found["prediction"][5].as_py() is None
    assert found["label"].to_pylist() == labels  # the gold column itself is untouched
    assert success(tmp_path)["totals"]["classes"] == ["bill", "card"]
    assert "probs by prototypes of 2 classes" in result.stderr
    shard = pq.read_schema(tmp_path / "out" / "part-00002.parquet")
    assert json.loads(shard.field("probs").metadata[b"classes"]) == ["bill", "card"]


def test_prototypes_of_whole_number_labels(tmp_path, supervise):
    path = write_parquet(tmp_path / "in.parquet", {"text": ["pay", "lose", "open"], "label": [7, 10, None]})
    supervise(path)
    found = done(tmp_path)
    assert found.schema.field("label").type == pa.int64()
    assert found["prediction"].to_pylist()[:2] == ["7", "10"]
    assert success(tmp_path)["totals"]["classes"] == ["10", "7"]


def test_head_of_the_checkpoint_gives_probs(tmp_path, supervise, classifier):
    path = write_parquet(tmp_path / "in.parquet", {"text": ["pay", None, "lose"], "label": ["x", "y", None]})
    supervise(path, model_name_or_path=str(classifier))
    found = done(tmp_path)
    probs = read_vectors(found["probs"], where="probs")
    assert probs.valid.tolist() == [True, False, True]
    assert np.allclose(probs.vectors.sum(axis=1), [1, 0, 1], atol=1e-6)
    expected = [CLASSES[index] for index in probs.vectors.argmax(axis=1)]
    assert found["prediction"].to_pylist() == [expected[0], None, expected[2]]
    assert success(tmp_path)["totals"]["classes"] == CLASSES


def test_prototypes_may_be_preferred_to_a_head(tmp_path, supervise, classifier):
    path = write_parquet(tmp_path / "in.parquet", {"text": ["pay", "lose"], "label": ["x", "y"]})
    supervise(path, model_name_or_path=str(classifier), head="prototype")
    assert done(tmp_path)["prediction"].to_pylist() == ["x", "y"]


@pytest.mark.parametrize("head", ["auto", "prototype"])
def test_no_head_and_no_labels_is_said_once(tmp_path, supervise, head):
    result = supervise(write_parquet(tmp_path / "in.parquet", {"text": ["pay"] * 40}), num_shards=4, head=head)
    found = done(tmp_path)
    assert found["probs"].null_count == found["prediction"].null_count == 40
    assert result.stderr.count("no labels in the input and no classification head") == 1


def test_head_none_leaves_probs_null_in_silence(tmp_path, supervise, classifier):
    path = write_parquet(tmp_path / "in.parquet", {"text": ["pay", "lose"], "label": ["x", "y"]})
    result = supervise(path, model_name_or_path=str(classifier), head="none")
    assert done(tmp_path)["probs"].null_count == 2
    assert "WARNING" not in result.stderr


def test_demanded_head_that_is_not_there(tmp_path, supervise):
    result = supervise(write_parquet(tmp_path / "in.parquet", {"text": ["pay"]}), head="classifier")
    assert result.exit_code == 1 and "has no classification head" in result.error


# --- Columns ---------------------------------------------------------------------------------------------------------


def test_other_columns_are_carried_unchanged(tmp_path, supervise):
    import datetime
    import decimal

    columns = {
        "id": pa.array([2**60, None, -1], pa.int64()),
        "text": ["pay", None, "lose"],
        "teacher_label": ["a", "b", None],
        "when": pa.array([datetime.datetime(2026, 1, 2, 3), None, None], pa.timestamp("us", tz="UTC")),
        "price": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("0.00")], pa.decimal128(10, 2)),
        "tags": pa.array([["a", None], [], None]),
        "meta": pa.array([{"k": 1, "v": "x"}, None, {"k": None, "v": "y"}]),
        "raw": pa.array([b"\x00\xff", None, b""]),
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
        "flag": [True, None, False],
        "vector": pa.array([[1.0, float("nan")], None, [0.0, 1.0]], pa.list_(pa.float64())),
        "имя": ["й", "ё", None],
    }
    source = pa.table(columns)
    supervise(write_parquet(tmp_path / "in.parquet", columns), num_shards=2)
    found = done(tmp_path)
    for name in set(columns) - {"kind", "vector"}:
        assert found[name].combine_chunks().equals(source[name].combine_chunks()), name
        assert found.schema.field(name).type == source.schema.field(name).type, name
    assert found["kind"].to_pylist() == ["x", "y", "x"]
    assert str(found["vector"].to_pylist()) == "[[1.0, nan], None, [0.0, 1.0]]"
    assert found.schema.names == [*columns, "cls", "probs", "prediction", "truncated", "error"]


def test_own_names_of_text_and_label(tmp_path, supervise):
    path = write_parquet(tmp_path / "in.parquet", {"intent": ["x", None], "utterance": ["pay", "lose"]})
    supervise(path, text_column="utterance", label_column="intent")
    found = done(tmp_path)
    assert found["text"].to_pylist() == ["pay", "lose"]
    assert found["label"].to_pylist() == ["x", None]
    assert not {"intent", "utterance"} & set(found.schema.names)


@pytest.mark.parametrize("name", ["cls", "probs", "prediction", "truncated", "error", "text", "label"])
def test_column_that_this_stage_writes_is_refused_by_name(tmp_path, supervise, name):
    columns = {"utterance": ["pay"], "intent": ["x"], name: ["mine"]}
    path = write_parquet(tmp_path / "in.parquet", columns)
    result = supervise(path, text_column="utterance", label_column="intent")
    assert result.exit_code == 1
    assert f"has a column {name!r}, which this stage writes itself; rename it" in result.error


def test_missing_text_column_and_missing_label_column_of_an_own_name(tmp_path, supervise):
    path = write_parquet(tmp_path / "in.parquet", {"utterance": ["pay"], "label": ["x"]})
    result = supervise(path)
    assert result.exit_code == 1
    assert "has no column 'text' (has: utterance, label); set supervise.text_column" in result.error
    result = supervise(path, text_column="utterance", label_column="intnt")
    assert result.exit_code == 1
    assert "has no column 'intnt' (has: utterance, label); set supervise.label_column" in result.error


def test_text_prefix_reaches_the_model_and_not_the_column(tmp_path, supervise, model):
    from common.encoder import load_encoder

    supervise(write_parquet(tmp_path / "in.parquet", {"text": ["pay"]}), text_prefix="please ")
    found = done(tmp_path)
    assert found["text"].to_pylist() == ["pay"]
    expected = load_encoder(str(model)).encode(["please pay"]).vectors
    assert np.abs(read_vectors(found["cls"], where="cls").vectors - expected).max() < 1e-5


def test_half_precision_on_the_disk(tmp_path, supervise):
    supervise(write_parquet(tmp_path / "in.parquet", {"text": ["pay", None]}), vector_dtype="float16")
    assert done(tmp_path).schema.field("cls").type == pa.list_(pa.field("element", pa.float16(), nullable=False), 32)


def test_float16_on_a_cpu_becomes_auto_with_a_warning(tmp_path, supervise):
    result = supervise(write_parquet(tmp_path / "in.parquet", {"text": ["pay"]}), dtype="float16", device="cpu")
    assert result.exit_code == 0
    assert "dtype float16 is not for CPUs; auto is used instead" in result.stderr
    assert success(tmp_path)["totals"]["dtype"] in ("float32", "bfloat16")


# --- Kinds of input --------------------------------------------------------------------------------------------------


def test_csv_gives_what_parquet_gives(tmp_path, supervise):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "in.csv").write_text('id,text,label\n007,"lose, my card",card\n008,,\n009,pay bill,bill\n')
    supervise(folder / "in.csv", num_shards=2)
    from_csv = done(tmp_path)
    shutil.rmtree(tmp_path / "out")
    columns = {
        "id": ["007", "008", "009"],
        "text": ["lose, my card", None, "pay bill"],
        "label": ["card", None, "bill"],
    }
    supervise(write_parquet(tmp_path / "in.parquet", columns), num_shards=2)
    assert from_csv.equals(done(tmp_path))
    assert not (tmp_path / "out" / ".input").exists()


def test_copy_of_an_older_csv_is_not_used(tmp_path, supervise):
    """A run that was killed leaves its copy of the input; a corrected input must not be read from that copy."""
    path = tmp_path / "in.csv"
    path.write_text("text\nold\n")
    supervise(path, "supervise.head=classifier")  # fails after the copy is made
    assert list((tmp_path / "out" / ".input").rglob("*.parquet"))
    path.write_text("text\nnew one\nnew two\n")
    result = supervise(path, "--overwrite")
    assert result.exit_code == 0
    assert done(tmp_path)["text"].to_pylist() == ["new one", "new two"]


def test_labels_of_mixed_types_over_files(tmp_path, supervise):
    write_parquet(tmp_path / "in" / "a.parquet", {"text": ["pay", "lose"], "label": [1, 2]})
    write_parquet(tmp_path / "in" / "b.parquet", {"text": ["open", "close"], "label": ["2", "x"]})
    supervise(tmp_path / "in")
    assert done(tmp_path)["label"].to_pylist() == ["1", "2", "2", "x"]
    assert success(tmp_path)["totals"]["classes"] == ["1", "2", "x"]


# --- Running again ---------------------------------------------------------------------------------------------------


def test_again_is_nothing_to_do_and_resume_false_computes(tmp_path, supervise):
    path = write_parquet(tmp_path / "in.parquet", {"text": ["pay", "lose"], "label": ["a", "b"]})
    supervise(path, num_shards=2)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "out").glob("part-*")}
    again = supervise(path, num_shards=2, batch_size=1, num_workers=1)
    assert again.exit_code == 0 and "nothing to do" in again.stderr
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "out").glob("part-*")} == before
    supervise(path, num_shards=2, resume=False)
    after = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "out").glob("part-*")}
    assert all(after[name][0] > before[name][0] and after[name][1] == before[name][1] for name in before)


def test_check_prints_the_plan_and_writes_nothing(tmp_path, supervise):
    path = write_parquet(tmp_path / "in.parquet", {"text": ["pay", "lose"]})
    plan = supervise(path, "--check", num_shards=2).json
    assert (plan["rows"], plan["shards"], plan["files"]) == (2, 2, 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("in.csv", "id,text\n1,pay\n"), ("in.jsonl", '{"id": 1}\n{"id": 2, "text": "pay"}\nnot JSON, and not read\n')],
)
def test_check_looks_for_the_text_column_without_copying(tmp_path, supervise, name, content):
    path = tmp_path / name
    path.write_text(content)
    assert supervise(path, "--check").json["files"] == 1
    path.write_text(content.replace("not JSON, and not read", ""))
    error = supervise(path, "--check", text_column="txt").error
    assert f"{name} has no column 'txt' (has: id, text); set supervise.text_column" in error
    assert not (tmp_path / "out").exists()

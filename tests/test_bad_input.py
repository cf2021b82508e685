"""Input and disks that are not as they should be, through the real scripts: a clear error or a counted null row."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.columns import read_vectors, vector_array
from common.commit import Identity, OutputLock
from common.config import StageSettings, UserError
from common.outputs import StageOutput
from common.shards import open_shards, read_stamp
from tests.stage_runner import SECTIONS, read_folder, run_main, run_stage, write_parquet
from tests.tiny_encoder import save_tiny_encoder

PCA, TRAIN = "cluster_normalize_and_pca", "cluster_train_clusters"
PURITY, DATASET = "cluster_purity_counter", "cluster_update_dataset"
DIMENSION = 8


def good_vectors(n_rows: int = 60, *, dimension: int = DIMENSION, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n_rows, dimension)) + 3 * np.eye(dimension)[np.arange(n_rows) % 4]).astype(np.float32)


@pytest.fixture
def vectors_dir(tmp_path) -> Path:
    """Vectors that another program wrote: List<double> in two files, with texts and labels."""
    for index in range(2):
        columns = {
            "cls": pa.array(good_vectors(seed=index).tolist(), pa.list_(pa.float64())),
            "text": [f"text {i}" for i in range(60)],
            "label": [["a", "b", None][i % 3] for i in range(60)],
            "teacher_label": ["abcd"[i % 4] for i in range(60)],
        }
        write_parquet(tmp_path / "vectors" / f"{index}.parquet", columns)
    return tmp_path / "vectors"


@pytest.fixture
def stage(tmp_path, vectors_dir):
    """Run one stage with its files at the usual places under `tmp_path`."""
    usual = {
        PCA: {"input_dir": "vectors", "output_dir": "pca", "n_components": 4},
        TRAIN: {"input_dir": "pca", "centroids_out": "centroids.parquet", "n_clusters": 4, "num_workers": 1},
        PURITY: {"shards_dir": "pca", "centroids_path": "centroids.parquet"},
        DATASET: {"shards_dir": "pca", "centroids_path": "centroids.parquet", "output_path": "dataset"},
    }
    paths = ("input_dir", "output_dir", "centroids_out", "shards_dir", "centroids_path", "output_path")

    def call(script: str, *arguments: str, **values):
        given = usual[script] | values
        given = {name: str(tmp_path / v) if name in paths and v else v for name, v in given.items()}
        return run_stage(script, tmp_path, given, *arguments)

    return call


@pytest.fixture
def up_to(stage):
    """Run the stages up to one; each must succeed."""
    story = [(PCA, {}), (TRAIN, {}), (TRAIN, {"run_mode": "predict"}), (PURITY, {}), (DATASET, {})]

    def call(n_stages: int) -> None:
        for script, values in story[:n_stages]:
            result = stage(script, **values)
            assert result.exit_code == 0, result.stderr

    return call


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith("lock"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.tmp")]


# --- The config, through every script --------------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted(SECTIONS))
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{section}:\n  progres: false\n", "progres: no such key; did you mean 'progress'?"),
        ("{section}s:\n  progress: false\n", "{section}s: no such section; did you mean '{section}'?"),
        ("{section}:\n  progress: perhaps\n", "progress: input should be a valid boolean"),
        ("{section}:\nengine:\n  n_jobs: 0\n", "engine.n_jobs: input should be greater than or equal to 1, not 0"),
        ("{section}:\n  progress: true\n  progress: false\n", "duplicate key"),
        ("{section}:\n", "{section}: the section is empty"),
        ("engine: {{}}\n", "{section}: the section is missing"),
    ],
)
def test_wrong_config_is_code_2(tmp_path, script, text, said):
    config = tmp_path / "config.yaml"
    config.write_text(text.format(section=SECTIONS[script]))
    result = run_main(script, config)
    assert result.exit_code == 2
    assert said.format(section=SECTIONS[script]) in result.error
    assert tree(tmp_path).keys() == {"config.yaml"}


def test_missing_config_is_code_2(tmp_path):
    assert run_main(PCA, tmp_path / "absent.yaml").exit_code == 2


# --- Files that are missing or of another kind -----------------------------------------------------------------------


@pytest.mark.parametrize(("script", "key"), [(PCA, "input_dir"), (TRAIN, "input_dir"), (PURITY, "shards_dir")])
def test_missing_empty_and_unfinished_input_folder(tmp_path, stage, script, key):
    assert "does not exist; run cluster_" in stage(script, **{key: "absent"}).error
    (tmp_path / "empty").mkdir()
    assert "holds no parquet files" in stage(script, **{key: "empty"}).error
    write_parquet(tmp_path / "file.parquet", {"x": [1]})
    assert "is a file, not a folder" in stage(script, **{key: "file.parquet"}).error
    write_parquet(tmp_path / "rowless" / "a.parquet", {"cls": pa.array([], pa.list_(pa.float32()))})
    assert "holds no rows" in stage(script, **{key: "rowless"}).error


def test_unfinished_output_of_a_stage_is_no_input(tmp_path, stage, up_to):
    up_to(1)
    (tmp_path / "pca" / "_SUCCESS").unlink()
    assert "is unfinished (it has no _SUCCESS)" in stage(TRAIN).error


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"shards": 3}', b"\xff\xfe"])
def test_damaged_success_file(tmp_path, stage, up_to, content):
    up_to(1)
    (tmp_path / "pca" / "_SUCCESS").write_bytes(content)
    assert f"{tmp_path / 'pca' / '_SUCCESS'} is damaged" in stage(TRAIN).error


def test_missing_column_names_those_that_are_there(stage, up_to):
    assert (
        "has no column 'embedding' (has: cls, text, label, teacher_label)"
        in stage(PCA, vector_column="embedding").error
    )
    up_to(2)
    result = stage(PURITY)
    assert "has no column 'cluster_id' (has: " in result.error
    assert "run cluster_train_clusters.py with train.run_mode=predict first" in result.error


@pytest.mark.parametrize("script", [PCA, DATASET])
def test_output_folder_that_is_a_file(tmp_path, stage, up_to, script):
    up_to(4)
    (tmp_path / "taken").write_text("precious")
    key = "output_dir" if script == PCA else "output_path"
    result = stage(script, **{key: "taken"})
    assert result.exit_code == 1 and "a file of that name is in the way" in result.error
    assert (tmp_path / "taken").read_text() == "precious"
    assert stage(script, **{key: "taken/deeper"}).exit_code == 1


def test_output_file_that_is_a_folder(tmp_path, stage, up_to):
    up_to(1)
    (tmp_path / "folder.parquet").mkdir()
    assert "is a folder; give the path of a file" in stage(TRAIN, centroids_out="folder.parquet").error


def test_output_file_without_a_suffix(tmp_path, stage, up_to):
    up_to(1)
    assert stage(TRAIN, centroids_out="centroids").exit_code == 0
    assert pq.read_table(tmp_path / "centroids").num_rows == 4


def test_output_folder_with_files_of_somebody_else(tmp_path, stage):
    write_parquet(tmp_path / "mine" / "data.parquet", {"x": [1]})
    before = tree(tmp_path / "mine")
    for arguments in ([], ["--overwrite"]):
        result = stage(PCA, *arguments, output_dir="mine")
        assert result.exit_code == 1 and "which no stage of this suite wrote" in result.error
    assert tree(tmp_path / "mine") == before


# --- Vectors ---------------------------------------------------------------------------------------------------------

BAD_ROWS = {
    2: ([float("nan")] + [1.0] * 7, "cls has NaN or Inf"),
    3: ([float("inf")] + [1.0] * 7, "cls has NaN or Inf"),
    5: ([float("inf"), float("-inf")] + [1.0] * 6, "cls has NaN or Inf"),
    7: (None, "cls is null"),
    11: ([0.0] * 8, "cls is a zero vector, which has no direction"),
    13: ([], "cls is null"),
    17: ([1e-42] * 8, "cls is a zero vector, which has no direction"),
    19: ([None] + [1.0] * 7, "cls has NaN or Inf"),
}


def write_bad_rows(folder: Path) -> Path:
    rows = good_vectors().tolist()
    for row, (vector, _) in BAD_ROWS.items():
        rows[row] = vector
    columns = {"row": list(range(60)), "cls": pa.array(rows, pa.list_(pa.float32())), "label": ["a"] * 60}
    return write_parquet(folder / "a.parquet", columns | {"teacher_label": ["a"] * 60, "text": ["t"] * 60})


def test_bad_vectors_become_counted_null_rows_from_stage_to_stage(tmp_path, stage):
    write_bad_rows(tmp_path / "bad")
    result = stage(PCA, input_dir="bad")
    found = read_folder(tmp_path / "pca")
    assert found["row"].to_pylist() == list(range(60))
    expected = [BAD_ROWS[row][1] if row in BAD_ROWS else None for row in range(60)]
    assert found["error"].to_pylist() == expected
    assert [v is None for v in found["pca"].to_pylist()] == [reason is not None for reason in expected]
    assert "rows in 60, rows out 60, of them without a vector 8" in result.stderr
    assert "trained on 52, without a vector 8" in stage(TRAIN).stderr
    assert stage(TRAIN, run_mode="predict").exit_code == 0
    ids = read_folder(tmp_path / "pca")["cluster_id"].to_pylist()
    assert [i is None for i in ids] == [reason is not None for reason in expected]
    counted = stage(PURITY).json
    assert (counted["n_scored"], counted["n_without_cluster"]) == (52, 8)
    assert stage(DATASET).json["rows"] == 60


def test_bad_vectors_change_nothing_for_the_others(tmp_path, stage):
    write_bad_rows(tmp_path / "bad")
    kept = [row for row in range(60) if row not in BAD_ROWS]
    write_parquet(tmp_path / "good" / "a.parquet", {"cls": vector_array(good_vectors()[kept])})
    stage(PCA, input_dir="bad")
    stage(PCA, input_dir="good", output_dir="pca_of_good")
    with_bad = read_vectors(read_folder(tmp_path / "pca")["pca"], where="pca")
    alone = read_vectors(read_folder(tmp_path / "pca_of_good")["pca"], where="pca")
    assert np.allclose(with_bad.vectors[with_bad.valid], alone.vectors, atol=1e-5)


def test_vectors_of_different_length(tmp_path, stage):
    write_parquet(tmp_path / "bad" / "a.parquet", {"cls": pa.array([[1.0, 2.0], [1.0]], pa.list_(pa.float32()))})
    assert "holds vectors of different length (2, but 1 in row 1 of its batch)" in stage(PCA, input_dir="bad").error


def test_shards_of_different_dimension(tmp_path, stage):
    write_parquet(tmp_path / "bad" / "a.parquet", {"cls": vector_array(good_vectors())})
    write_parquet(tmp_path / "bad" / "b.parquet", {"cls": vector_array(good_vectors(dimension=5))})
    result = stage(PCA, input_dir="bad")
    assert "b.parquet, column 'cls' holds vectors of length 5, expected 8" in result.error
    result = stage(TRAIN, input_dir="bad", pca_column="cls")
    assert "holds vectors of length 5, expected 8" in result.error


@pytest.mark.parametrize("column", [["text"] * 9, [["a"]] * 9, list(range(9))])
def test_column_that_holds_no_vectors(tmp_path, stage, column):
    write_parquet(tmp_path / "bad" / "a.parquet", {"cls": column})
    assert ", not vectors (a list of numbers in each row)" in stage(PCA, input_dir="bad").error


@pytest.mark.parametrize("vector", [None, [], [0.0, 0.0], [float("nan"), 1.0]])
def test_no_usable_vector_at_all(tmp_path, stage, vector):
    write_parquet(tmp_path / "bad" / "a.parquet", {"cls": pa.array([vector] * 5, pa.list_(pa.float32()))})
    assert "no row of" in stage(PCA, input_dir="bad").error
    if vector != [0.0, 0.0]:
        assert "has a usable vector in 'cls'" in stage(TRAIN, input_dir="bad", pca_column="cls").error


def test_one_row(tmp_path, stage):
    write_parquet(tmp_path / "one" / "a.parquet", {"cls": vector_array(good_vectors(1)), "teacher_label": ["a"]})
    assert "n_components=4 is more than 1 rows of 8 dimensions can give" in stage(PCA, input_dir="one").error
    assert "there is a single vector" in stage(PCA, input_dir="one", n_components=1).error
    settings = {"input_dir": "one", "pca_column": "cls", "centroids_out": "c.parquet", "n_clusters": 1}
    assert stage(TRAIN, **settings).exit_code == 0
    assert stage(TRAIN, **settings, run_mode="predict").exit_code == 0
    assert stage(PURITY, shards_dir="one", centroids_path="c.parquet").json["purity"] == 1.0


def test_more_clusters_than_rows_with_a_vector(tmp_path, stage, up_to):
    write_bad_rows(tmp_path / "bad")
    stage(PCA, input_dir="bad")
    assert "train.n_clusters=53 is more than the 52 rows with a vector" in stage(TRAIN, n_clusters=53).error
    assert "train.n_clusters=53 is more than the 52 rows" in stage(TRAIN, n_clusters=[4, 53]).error
    assert not (tmp_path / "centroids.parquet").exists()


def test_a_gpu_that_is_not_there_leaves_training_as_it_is_on_the_cpu(tmp_path, stage, up_to, monkeypatch):
    """Its products too: in bfloat16 a processor without AMX would take twice as long, and round."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    up_to(1)
    assert stage(TRAIN).exit_code == 0
    result = stage(TRAIN, gpu=True, centroids_out="asked.parquet")
    assert result.exit_code == 0 and result.stderr.count("no GPU is usable, so the CPU is used") == 1
    usual, asked = tmp_path / "centroids.parquet", tmp_path / "asked.parquet"
    assert pq.read_table(usual).equals(pq.read_table(asked))
    assert read_stamp(usual).identity["keys"]["precision"] == read_stamp(asked).identity["keys"]["precision"]


def test_what_is_refused_takes_nothing_away(tmp_path, stage, up_to):
    up_to(2)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*") if path.suffix in (".parquet", ".joblib")}
    assert set(before) == {"centroids.parquet", "kmeans.joblib"}
    assert "is more than the 120 rows with a vector" in stage(TRAIN, "--overwrite", n_clusters=121).error
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("algorithm", ["minibatch", "lloyd", "spherical"])
def test_more_clusters_than_different_rows(tmp_path, stage, algorithm):
    write_parquet(tmp_path / "same" / "a.parquet", {"pca": vector_array(np.ones((20, 4), np.float32))})
    assert stage(TRAIN, input_dir="same", algorithm=algorithm, n_clusters=3).exit_code == 0
    centroids = pq.read_table(tmp_path / "centroids.parquet")
    assert np.isfinite(read_vectors(centroids["center"], where="center").vectors).all()
    assert sum(centroids["size"].to_pylist()) == 20


# --- Damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -8, -200])
def test_truncated_parquet(tmp_path, stage, up_to, keep):
    path = tmp_path / "vectors" / "1.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    assert "1.parquet is damaged" in stage(PCA).error
    assert not list((tmp_path).glob("pca/part-*"))


def test_truncated_shard_of_ours_is_refused_and_written_again(tmp_path, stage, up_to):
    up_to(1)
    whole = tree(tmp_path / "pca")
    path = tmp_path / "pca" / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    assert "part-00001.parquet is damaged" in stage(TRAIN).error
    again = stage(PCA)
    assert again.exit_code == 0 and "it is written again" in again.stderr
    assert tree(tmp_path / "pca") == whole


def test_missing_shard_is_named_and_written_again(tmp_path, stage, up_to):
    up_to(1)
    whole = tree(tmp_path / "pca")
    (tmp_path / "pca" / "part-00000.parquet").unlink()
    assert "part-00000.parquet is missing; run the stage that writes it again" in stage(TRAIN).error
    assert stage(PCA).exit_code == 0
    assert tree(tmp_path / "pca") == whole


def test_shard_from_another_configuration(tmp_path, stage, up_to):
    up_to(1)
    assert stage(PCA, output_dir="other", whiten=True).exit_code == 0
    shutil.copy(tmp_path / "other" / "part-00000.parquet", tmp_path / "pca" / "part-00000.parquet")
    assert "part-00000.parquet is not the one that" in stage(TRAIN).error


def committed_shard(folder: Path) -> Path:
    """A committed folder with one shard of every kind of column."""
    rows = 5
    table = pa.table(
        {
            "text": ["lose card", "pay bill", None, "open", "close"],
            "id": list(range(rows)),
            "cls": vector_array(np.arange(10, dtype=np.float32).reshape(rows, 2)),
            "probs": vector_array(np.ones((rows, 2), np.float32), valid=np.array([1, 1, 0, 1, 1], bool)),
        }
    )
    identity = Identity("supervise", {"head": "auto"}, {"input_parquet": "abc"})
    with StageOutput(folder, identity) as output:
        output.task("part-00000.parquet", rows).write(table.schema, [table])
        output.finish(["part-00000.parquet"], StageSettings(), {})
    return folder / "part-00000.parquet"


def read_committed(folder: Path) -> pa.Table:
    shards = open_shards(folder, written_by="cluster_supervise.py")
    shards.require_columns("text", "id", "cls", "probs")
    return pa.concat_tables(list(shards.iter_tables(shards.schema.names)))


def test_flipped_bit_anywhere_in_a_shard_is_found_or_harmless(tmp_path):
    path = committed_shard(tmp_path / "in")
    whole, expected = path.read_bytes(), read_committed(tmp_path / "in")
    n_found = 0
    for place in range(0, len(whole), 2):
        content = bytearray(whole)
        content[place] ^= 1 << (place // 2 * 5 % 8)  # another bit from byte to byte
        path.write_bytes(content)
        try:
            found = read_committed(tmp_path / "in")
        except UserError as problem:
            assert "part-00000.parquet" in str(problem)
            n_found += 1
        else:
            assert found.equals(expected), f"bit flip in byte {place} of {len(whole)} changed what is read"
    assert n_found > len(whole) / 4


def test_flipped_bit_of_a_vector_stops_every_stage_that_reads_it(tmp_path, stage, up_to):
    up_to(4)
    path = tmp_path / "pca" / "part-00000.parquet"
    content = path.read_bytes()
    vectors = read_vectors(pq.read_table(path)["pca"], where="pca").vectors
    place = content.index(vectors[10].tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    result = stage(TRAIN, centroids_out="other.parquet")
    assert result.exit_code == 1 and "part-00000.parquet is damaged" in result.error
    result = stage(TRAIN, "--overwrite", run_mode="predict")
    assert result.exit_code == 1 and "part-00000.parquet is damaged" in result.error


@pytest.mark.parametrize("keep", [0, 10, -50])
def test_truncated_centroids(tmp_path, stage, up_to, keep):
    up_to(3)
    path = tmp_path / "centroids.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    for result in (stage(TRAIN, run_mode="predict"), stage(PURITY)):
        assert "centroids.parquet is damaged" in result.error


# --- Centroids -------------------------------------------------------------------------------------------------------


def test_centroids_of_another_dimension(tmp_path, stage, up_to):
    up_to(1)
    before = tree(tmp_path / "pca")
    write_parquet(
        tmp_path / "c.parquet", {"centroid_id": [0, 1], "center": vector_array(np.eye(2, 7, dtype=np.float32))}
    )
    for arguments in (["--check"], []):
        result = stage(TRAIN, *arguments, run_mode="predict", centroids_out="c.parquet")
        assert "have dimension 7, but" in result.error and "holds vectors of length 4" in result.error
    assert tree(tmp_path / "pca") == before


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"centroid_id": [0]}, "has no column 'center' (has: centroid_id)"),
        ({"center": [[1.0] * 4]}, "has no column 'centroid_id'"),
        ({"centroid_id": [0, 0], "center": [[1.0] * 4, [2.0] * 4]}, "hold a centroid_id twice"),
        ({"centroid_id": [0, 1], "center": [[1.0] * 4, None]}, "hold null, NaN or Inf centers"),
        ({"centroid_id": [0, 1], "center": [[1.0] * 4, [float("nan")] * 4]}, "hold null, NaN or Inf centers"),
        ({"centroid_id": pa.array([], pa.int32()), "center": pa.array([], pa.list_(pa.float32()))}, "are empty"),
    ],
)
def test_centroids_that_are_none(tmp_path, stage, up_to, columns, said):
    up_to(1)
    write_parquet(tmp_path / "c.parquet", columns)
    assert said in stage(TRAIN, run_mode="predict", centroids_out="c.parquet").error


def test_missing_centroids(stage, up_to):
    up_to(1)
    assert "do not exist; run cluster_train_clusters.py first" in stage(TRAIN, run_mode="predict").error
    assert stage(PURITY).exit_code == 1


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_tampered_joblib_is_never_loaded(tmp_path, stage, up_to):
    up_to(2)
    proof, model = tmp_path / "loaded", tmp_path / "kmeans.joblib"
    poison = pickle.dumps(Payload(str(proof)))
    pickle.loads(poison)  # the negative control
    assert proof.exists()
    proof.unlink()
    model.write_bytes(poison)
    assert stage(TRAIN).exit_code == 0  # nothing to do
    assert stage(TRAIN, run_mode="predict").exit_code == 0
    assert stage(PURITY).exit_code == 0
    assert stage(DATASET).exit_code == 0
    assert model.read_bytes() == poison and not proof.exists()
    assert stage(TRAIN, "--overwrite", random_state=1).exit_code == 0
    assert model.read_bytes() != poison and not proof.exists()


# --- The disk --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(n_bytes: int):
    """A real refusal of the kernel to write past a size, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_kernel_that_refuses_to_write(tmp_path, stage):
    with largest_file(2500):
        result = stage(PCA)
    assert result.exit_code == 1
    assert "the file would be larger than this file system" in result.error
    assert temporaries(tmp_path) == [] and not (tmp_path / "pca" / "_SUCCESS").exists()
    assert stage(PCA).exit_code == 0
    assert read_folder(tmp_path / "pca").num_rows == 120


@pytest.mark.parametrize(
    ("n_before", "script", "values"),
    [
        (0, PCA, {}),
        (1, TRAIN, {}),
        (2, TRAIN, {"run_mode": "predict"}),
        (3, PURITY, {}),
        (4, DATASET, {}),
        (4, DATASET, {"output_path": "dataset.parquet"}),
    ],
)
def test_full_disk_at_every_flush(tmp_path, monkeypatch, stage, up_to, n_before, script, values):
    """The disk is full at the first fsync, then at the second, …: an error each time, and nothing is lost."""
    up_to(n_before)
    shutil.copytree(tmp_path, tmp_path.with_name("before"))
    assert stage(script, **values).exit_code == 0
    expected = tree(tmp_path)
    flush, n_failed = os.fsync, 0
    for n_allowed in range(0, 40, 3):
        shutil.rmtree(tmp_path)
        shutil.copytree(tmp_path.with_name("before"), tmp_path)
        calls = iter(range(n_allowed))

        def full(descriptor, calls=calls):
            if next(calls, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            flush(descriptor)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            result = stage(script, **values)
        if result.exit_code == 0:
            break
        n_failed += 1
        assert result.exit_code == 1 and "the disk is full" in result.error
        assert temporaries(tmp_path) == []
        assert stage(script, **values).exit_code == 0
        found = tree(tmp_path)
        assert [name for name in expected if found.get(name) != expected[name]] == []
    shutil.rmtree(tmp_path.with_name("before"))
    assert n_failed > 0 and result.exit_code == 0


def test_two_runs_at_once(tmp_path, stage, up_to):
    up_to(1)
    with OutputLock(tmp_path / "pca", is_file=False):
        result = stage(PCA)
        assert result.exit_code == 75
        assert f"is being written by pid {os.getpid()} on " in result.error
        up_to_predict = stage(TRAIN)
        assert up_to_predict.exit_code == 0  # reading is not writing
        assert stage(TRAIN, run_mode="predict").exit_code == 75
    with OutputLock(tmp_path / "centroids.parquet", is_file=True):
        assert stage(TRAIN, "--overwrite", random_state=3).exit_code == 75
    assert stage(PCA).exit_code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_may_not_be_written(tmp_path, stage):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "permission denied" in stage(PCA, output_dir="closed/pca").error


# --- Folders of other programs ---------------------------------------------------------------------------------------


def test_plain_folder_goes_through_every_stage_in_place(tmp_path, stage):
    """A folder that no stage of ours wrote gets its ids in place and is still an input for what follows."""
    settings = {"input_dir": "vectors", "pca_column": "cls"}
    before = read_folder(tmp_path / "vectors")
    assert stage(TRAIN, **settings).exit_code == 0
    assert stage(TRAIN, **settings, run_mode="predict").exit_code == 0
    assert "nothing to do" in stage(TRAIN, **settings, run_mode="predict").stderr
    assert stage(PURITY, shards_dir="vectors").json["n_scored"] == 120
    assert stage(DATASET, shards_dir="vectors").json["rows"] == 120
    assert stage(PCA).exit_code == 0
    after = read_folder(tmp_path / "vectors")
    assert after.select(before.schema.names).equals(before)


def test_folder_whose_error_column_is_no_text(tmp_path, stage):
    columns = {"cls": pa.array([*good_vectors(9).tolist(), None], pa.list_(pa.float32())), "error": [7, *[None] * 9]}
    write_parquet(tmp_path / "in" / "a.parquet", columns)
    assert stage(PCA, input_dir="in").exit_code == 0
    assert read_folder(tmp_path / "pca")["error"].to_pylist() == ["7", *[None] * 8, "cls is null"]


# --- Model folders ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("model"), dropout=0.0)


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncate_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def break_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (break_tokenizer, "has no usable tokenizer"),
        (break_weights, "cannot be loaded"),
        (truncate_weights, "cannot be loaded"),
        (break_config, "has no config.json"),
    ],
)
def test_model_folder_that_lacks_something(tmp_path, model, break_it, said):
    shutil.copytree(model, tmp_path / "model")
    break_it(tmp_path / "model")
    write_parquet(tmp_path / "in.parquet", {"text": ["pay"]})
    values = {"model_name_or_path": str(tmp_path / "model"), "input_parquet": str(tmp_path / "in.parquet")}
    result = run_stage("cluster_supervise", tmp_path, values | {"output_dir": str(tmp_path / "out")})
    assert result.exit_code == 1
    assert said in result.error and str(tmp_path / "model") in result.error
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_checkpoint_with_a_random_head_gives_no_probabilities(tmp_path, model):
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    write_parquet(tmp_path / "in.parquet", {"text": ["pay", "lose"]})
    values = {"model_name_or_path": str(tmp_path / "model"), "input_parquet": str(tmp_path / "in.parquet")}
    result = run_stage("cluster_supervise", tmp_path, values | {"output_dir": str(tmp_path / "out")})
    assert result.exit_code == 0
    assert "has no classification head (the weights lack classifier." in result.stderr
    assert read_folder(tmp_path / "out")["probs"].null_count == 2

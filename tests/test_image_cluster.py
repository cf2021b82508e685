"""The whole of image_cluster.py on real images: the digits of scikit-learn, and the awkward inputs of users."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import image_cluster
from common import cli
from common.commit import OutputLock
from common.config import UserError, settings_from_values, settings_to_yaml
from demo.digit_images import digit_settings, write_digit_images
from image_parts import question
from image_parts.scan import scan_images
from image_parts.settings import ImageSettings
from image_parts.tables import read_tables
from tests.image_files import encode, picture, tiny_dinov2, tiny_resnet

ROOT = Path(__file__).parent.parent


def main(*arguments: str) -> int:
    return cli.main(
        ImageSettings,
        image_cluster.run,
        doc="",
        section=None,
        check=image_cluster.check,
        add_arguments=image_cluster.add_arguments,
        argv=arguments,
    )


def contents(folder: Path, pattern: str = "*.png") -> Counter[str]:
    return Counter(hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob(pattern))


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The demo, computed once: images/, config.yaml, cache/ and clusters/, nothing sorted yet."""
    folder = tmp_path_factory.mktemp("digits")
    assert write_digit_images(folder / "images") == 1797
    settings = digit_settings(folder)
    (folder / "config.yaml").write_text(settings_to_yaml(settings))
    result = image_cluster.run(settings)
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def sorted_digits(digits, tmp_path) -> ImageSettings:
    """The finished demo with an output folder of its own, in which files may be sorted."""
    shutil.copytree(digits / "clusters", tmp_path / "clusters")
    return settings_from_values(
        ImageSettings, digit_settings(digits).model_dump() | {"output_dir": str(tmp_path / "clusters")}, source="test"
    )


# --- The digits ------------------------------------------------------------------------------------------------------


def test_digits_are_told_apart_without_their_number(digits):
    result = json.loads((digits / "result.json").read_text())
    assert result["truth"]["acc"] >= 0.90 and result["truth"]["nmi"] >= 0.90 and result["truth"]["ari"] >= 0.85
    assert result["n_images"] == 1797 and result["n_bad"] == 0 and result["verdict"] == "PASS"
    assert result["files"] == {"stage": "none", "reason": "no terminal and no --yes"}


def test_tables_hold_one_row_for_each_image(digits):
    table = pq.read_table(digits / "clusters" / "clusters.parquet")
    assert table.column_names == [
        "path", "relative_path", "sha256", "width", "height", "n_bytes", "cluster_id", "cluster", "raw_label",
        "probability", "distance", "x", "y", "z", "label",
    ]  # fmt: skip
    rows = table.to_pylist()
    assert len({row["path"] for row in rows}) == 1797
    for row in rows[::200]:
        assert hashlib.sha256(Path(row["path"]).read_bytes()).hexdigest() == row["sha256"]
        assert row["label"] == Path(row["path"]).parent.name and (row["width"], row["height"]) == (8, 8)
        assert row["cluster"] == f"cluster_{row['cluster_id']:03d}"
    sizes = Counter(row["cluster_id"] for row in rows)
    assert [sizes[number] for number in sorted(sizes)] == sorted(sizes.values(), reverse=True)
    with (digits / "clusters" / "clusters.csv").open(newline="") as file:
        assert [row["sha256"] for row in csv.DictReader(file)] == table["sha256"].to_pylist()


def test_the_purity_report_agrees_with_the_table(digits):
    report = json.loads((digits / "clusters/metrics/purity_report_latest.json").read_text())
    matrix = np.load(digits / "clusters/metrics/centroid_cosine_matrix.npy")
    sizes = Counter(pq.read_table(digits / "clusters" / "clusters.parquet")["cluster"].to_pylist())
    assert {cluster["cluster"]: cluster["size"] for cluster in report["clusters"]} == sizes
    off_diagonal = matrix[~np.eye(len(matrix), dtype=bool)]
    assert report["metrics"]["max_centroid_cosine"] == pytest.approx(off_diagonal.max())
    assert report["truth"]["acc"] >= 0.90 and report["thresholds"]["min_silhouette"] == 0.25


def test_exports_open_elsewhere(digits):
    from google.protobuf import text_format
    from PIL import Image
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    exports = digits / "clusters" / "exports"
    atlas = pq.read_table(exports / "embedding_atlas.parquet")
    row = atlas.slice(1500, 1).to_pylist()[0]
    assert row["image"]["bytes"][:3] == b"\xff\xd8\xff" and len(row["vector"]) == 50
    assert len(row["neighbors"]["ids"]) == 5 and 1500 not in row["neighbors"]["ids"]
    assert sorted(row["neighbors"]["distances"]) == row["neighbors"]["distances"]
    with (exports / "fiftyone.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1797 and all(Path(row["filepath"]).is_file() for row in rows[::300])

    config = text_format.Parse((exports / "projector/projector_config.pbtxt").read_text(), ProjectorConfig())
    embedding = config.embeddings[0]
    vectors = np.loadtxt(exports / "projector" / embedding.tensor_path, delimiter="\t")
    metadata = (exports / "projector" / embedding.metadata_path).read_text().splitlines()
    with Image.open(exports / "projector" / embedding.sprite.image_path) as sprite:
        n_columns = sprite.width // embedding.sprite.single_image_dim[0]
        assert sprite.width == sprite.height and n_columns**2 >= 1797 > (n_columns - 1) ** 2
    assert vectors.shape == (1797, 50) and len(metadata) == 1798 and metadata[0] == "file\tcluster\tprobability"


def test_pictures_are_there(digits):
    names = {path.name for path in (digits / "clusters" / "viz").iterdir()}
    assert names == {
        "interactive_scatter.html",
        "cluster_grid.png",
        "cluster_sizes.png",
        "preprocessing_comparison.png",
    }


def test_the_same_again_does_nothing_but_ask(sorted_digits, capsys):
    before = {path: path.stat().st_mtime_ns for path in Path(sorted_digits.output_dir).rglob("*") if path.is_file()}
    result = image_cluster.run(sorted_digits)
    after = {path: path.stat().st_mtime_ns for path in Path(sorted_digits.output_dir).rglob("*") if path.is_file()}
    changed = {path.name for path in after if before.get(path) != after[path]}
    assert changed <= {".lock"} and result["truth"]["acc"] >= 0.9


def test_another_configuration_is_refused_and_names_the_key(sorted_digits):
    changed = settings_from_values(
        ImageSettings, sorted_digits.model_dump() | {"clustering": {"min_cluster_size": 60}}, source="test"
    )
    with pytest.raises(UserError, match=r"clustering.min_cluster_size: 80 -> 60.*--overwrite"):
        image_cluster.run(changed)


def test_sorting_loses_no_file_to_equal_names_and_undo_brings_all_back(sorted_digits):
    output_dir, images = Path(sorted_digits.output_dir), Path(sorted_digits.input_dir)
    result = image_cluster.run(sorted_digits, yes=True)
    assert result["files"]["n_changed"] == 1797 and result["files"]["n_images"] == 1797
    placed = list(output_dir.glob("cluster_*/img/*.png"))
    assert Counter(hashlib.sha256(path.read_bytes()).hexdigest() for path in placed) == contents(images)
    table = pq.read_table(output_dir / "clusters.parquet").to_pylist()
    for row in table[::100]:
        target = output_dir / row["target"]
        assert target.parent.parent.name == row["cluster"] and target.read_bytes() == Path(row["path"]).read_bytes()
        assert row["label"] == Path(row["path"]).parent.name
    with (output_dir / "exports" / "fiftyone.csv").open(newline="") as file:
        assert all(Path(row["filepath"]).is_relative_to(output_dir) for row in csv.DictReader(file))
    write_digit_images(images)  # as the demo does when it is started again: nothing is written, the plan is the same
    assert image_cluster.run(sorted_digits, yes=True)["files"]["n_changed"] == 0
    changed = settings_from_values(
        ImageSettings, sorted_digits.model_dump() | {"clustering": {"min_cluster_size": 60}}, source="test"
    )
    with pytest.raises(UserError, match=r"sorted by another result.*--undo"):
        image_cluster.run(changed, overwrite=True, yes=True)
    undone = image_cluster.run(sorted_digits, undo_files=True)
    assert undone["files"]["stage"] == "undone" and not list(output_dir.glob("cluster_*"))
    assert (output_dir / "run.json").exists()


@pytest.mark.parametrize(("answer", "n_sorted"), [("да\n", 1797), ("n\n", 0)])
def test_the_question_on_a_real_terminal(sorted_digits, tmp_path, answer, n_sorted):
    config = tmp_path / "config.yaml"
    config.write_text(settings_to_yaml(sorted_digits))
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "image_cluster.py", "--config", str(config), "progress=false"],
        cwd=ROOT, stdin=slave, stdout=subprocess.PIPE, stderr=slave, env={**os.environ, "PYTHONUTF8": "1"},
    )  # fmt: skip
    os.close(slave)
    shown = read_until(master, "[y/n]")
    assert "Copy 1,797 images" in shown and "cluster_000" in shown
    os.write(master, answer.encode())
    stdout, _ = process.communicate(timeout=60)
    os.close(master)
    assert process.returncode == 0
    assert json.loads(stdout)["files"].get("n_changed", 0) == n_sorted
    assert len(list(Path(sorted_digits.output_dir).glob("cluster_*/img/*.png"))) == n_sorted


def read_until(descriptor: int, text: str) -> str:
    shown, deadline = b"", time.monotonic() + 60
    while text.encode() not in shown and time.monotonic() < deadline:
        if select.select([descriptor], [], [], 1)[0]:
            shown += os.read(descriptor, 65536)
    return shown.decode(errors="replace")


@pytest.mark.parametrize("lines", [["y"], ["YES"], ["т"], ["Так"], ["д"], ["да "], ["what?", "yes"]])
def test_every_yes_is_understood(monkeypatch, lines):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    assert question.ask("Sort?")


@pytest.mark.parametrize("text", ["n\n", "\n", "", "нет\n", "ні\n", "maybe\n"])
def test_everything_else_is_no(monkeypatch, text):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert not question.ask("Sort?")


# --- Small and awkward folders ---------------------------------------------------------------------------------------


def small_settings(tmp_path: Path, **sections) -> ImageSettings:
    values = {
        "input_dir": str(tmp_path / "in"),
        "output_dir": str(tmp_path / "out"),
        "progress": False,
        "model": {"name": "hog", "image_size": 32, "num_workers": 1},
        "cache": {"cache_dir": str(tmp_path / "cache")},
        "reduction": {"umap_components": 2, "pca_components": 5, "umap_n_neighbors": 6},
        "clustering": {"min_cluster_size": 5, "min_samples": 2},
        "visualization": {"enabled": False},
        "exports": {"embedding_atlas": False, "fiftyone": False, "tensorboard": False},
        **sections,
    }
    return settings_from_values(ImageSettings, values, source="test")


def stripes(angle: int, *, seed: int) -> np.ndarray:
    """Stripes of one direction with some noise: two directions are two clusters for any model."""
    rows, columns = np.indices((40, 40))
    wave = np.sin((rows if angle else columns) / 3.0) * 100 + 128
    return np.clip(wave + np.random.default_rng(seed).normal(0, 12, wave.shape), 0, 255).astype(np.uint8)


def write_stripes(folder: Path, n: int = 12) -> Path:
    for angle in (0, 1):
        for number in range(n):
            path = folder / f"angle{angle}" / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(stripes(angle, seed=100 * angle + number), "PNG"))
    return folder


@pytest.fixture
def stripes_dir(tmp_path) -> Path:
    return write_stripes(tmp_path / "in")


def test_two_runs_write_the_same_bytes(stripes_dir, tmp_path):
    settings = small_settings(tmp_path, purity={"truth": "parent_folder"})
    result = image_cluster.run(settings)
    assert result["truth"]["purity"] == 1.0 and result["n_clusters"] >= 2
    first = (tmp_path / "out" / "clusters.parquet").read_bytes()
    shutil.rmtree(tmp_path / "out")
    image_cluster.run(settings)
    assert (tmp_path / "out" / "clusters.parquet").read_bytes() == first


def test_a_run_that_died_is_done_again(stripes_dir, tmp_path, monkeypatch):
    settings = small_settings(tmp_path)
    image_cluster.run(settings)
    whole = (tmp_path / "out" / "clusters.parquet").read_bytes()
    shutil.rmtree(tmp_path / "out")

    def die(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(image_cluster, "write_tables", die)
        with pytest.raises(KeyboardInterrupt):
            image_cluster.run(settings)
    assert not (tmp_path / "out" / "run.json").exists()
    image_cluster.run(settings)
    assert (tmp_path / "out" / "clusters.parquet").read_bytes() == whole


def test_a_table_is_used_again_only_for_the_images_that_it_lists(stripes_dir, tmp_path):
    """In their order, with their hashes; images that it lacks were not decoded."""
    settings, out = small_settings(tmp_path), tmp_path / "out"
    image_cluster.run(settings)
    scanned = scan_images(stripes_dir, extensions=settings.image_extensions, cache_dir=None, n_workers=1)
    table = pq.read_table(out / "clusters.parquet")
    last = table.num_rows - 1

    def read(changed):
        pq.write_table(changed, out / "clusters.parquet")
        return read_tables(out, scanned)

    clustered, undecoded = read(table)
    assert clustered.records == scanned.records and undecoded == []
    assert clustered.labels.tolist() == table["cluster_id"].to_pylist()
    assert clustered.coordinates[5].tolist() == [table[axis][5].as_py() for axis in "xyz"]
    for missing in (0, 7, last):
        rows = [row for row in range(table.num_rows) if row != missing]
        clustered, undecoded = read(table.take(rows))
        assert undecoded == [scanned.records[missing]] and list(clustered.records) == [scanned.records[r] for r in rows]
        assert clustered.labels.tolist() == table["cluster_id"].take(rows).to_pylist()
    assert read(table.take([1, 0, *range(2, last + 1)])) is None
    assert read(table.take([*range(last + 1), last])) is None
    hashes = ["0" * 64, *table["sha256"].to_pylist()[1:]]
    assert read(table.set_column(2, "sha256", [hashes])) is None
    assert read(table.drop_columns("x")) is None
    (out / "clusters.parquet").write_bytes(b"no table")
    assert read_tables(out, scanned) is None


def test_overwrite_replaces_the_result(stripes_dir, tmp_path):
    image_cluster.run(small_settings(tmp_path))
    changed = small_settings(tmp_path, clustering={"min_cluster_size": 6, "min_samples": 2})
    with pytest.raises(UserError, match=r"min_cluster_size: 5 -> 6"):
        image_cluster.run(changed)
    image_cluster.run(changed, overwrite=True)
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert settings["clustering"]["min_cluster_size"] == 6


def test_bad_images_and_duplicates_beside_good_ones(stripes_dir, tmp_path):
    (stripes_dir / "empty.png").write_bytes(b"")
    (stripes_dir / 'quo"te,\n.png').write_bytes(b"no image")
    truncated = encode(np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8), "JPEG")
    (stripes_dir / "cut.jpg").write_bytes(truncated[:-300])
    for number in range(30):
        shutil.copy(stripes_dir / "angle0" / "00.png", stripes_dir / f"copy{number}.png")
    result = image_cluster.run(small_settings(tmp_path), yes=True)
    assert (result["n_images"], result["n_distinct"], result["n_bad"]) == (54, 24, 3)
    with (tmp_path / "out" / "bad_images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["path"] for row in rows} == {"empty.png", 'quo"te,\n.png', "cut.jpg"}
    assert all(row["reason"] for row in rows)
    table = pq.read_table(tmp_path / "out" / "clusters.parquet").to_pylist()
    copies = {row["cluster_id"] for row in table if "copy" in row["path"] or row["relative_path"] == "angle0/00.png"}
    assert len(copies) == 1 and result["files"]["n_images"] == 54
    again = image_cluster.run(small_settings(tmp_path), yes=True)
    assert again["files"]["n_changed"] == 0 and again["n_bad"] == 3


def test_names_of_every_kind_go_the_whole_way(stripes_dir, tmp_path):
    names = [
        b"new\nline",
        b"tab\there",
        b"quote'\"",
        b"<script>alert(1)<",
        b"x" * 251,
        "кот".encode(),
        b"caf\xe9",
        b" ",
    ]
    for path, name in zip(sorted(stripes_dir.rglob("*.png")), names, strict=False):
        path.rename(os.fsdecode(os.fsencode(path.parent) + b"/" + name.replace(b"/", b"") + b".png"))
    before = contents(stripes_dir)
    settings = small_settings(tmp_path, mode="move", visualization={"enabled": True}, exports={})
    image_cluster.run(settings, yes=True)
    placed = contents(tmp_path / "out") - contents(tmp_path / "out/viz") - contents(tmp_path / "out/exports")
    assert contents(stripes_dir) == Counter() and placed == before
    table = pq.read_table(tmp_path / "out" / "clusters.parquet")["relative_path"].to_pylist()
    assert "angle0/caf\\xe9.png" in table and "angle0/new\nline.png" in table
    with (tmp_path / "out/exports/fiftyone.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 24
    assert len((tmp_path / "out/exports/projector/metadata.tsv").read_text().splitlines()) == 25
    image_cluster.run(settings, undo_files=True)
    assert contents(stripes_dir) == before


@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_too_few_images_end_with_a_message(tmp_path, capsys, n_images):
    (tmp_path / "in").mkdir()
    for number in range(n_images):
        (tmp_path / "in" / f"{number}.png").write_bytes(encode(picture(seed=number), "PNG"))
    config = tmp_path / "config.yaml"
    config.write_text(settings_to_yaml(small_settings(tmp_path)))
    assert main("--config", str(config)) == 1
    message = capsys.readouterr().err
    assert "error: " in message and ("no file with one of the extensions" if n_images == 0 else "too few") in message


def test_all_images_equal(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(60):
        (tmp_path / "in" / f"{number}.png").write_bytes(encode(picture(), "PNG"))
    with pytest.raises(UserError, match="1 distinct image is too few"):
        image_cluster.run(small_settings(tmp_path))


def test_nothing_but_noise_and_more_neighbors_than_images(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number in range(14):
        (tmp_path / "in" / f"{number}.png").write_bytes(encode(picture(seed=number), "PNG"))
    settings = small_settings(
        tmp_path,
        reduction={"umap_components": 2, "umap_n_neighbors": 200},
        clustering={"min_cluster_size": 13, "min_samples": 13},
        visualization={"enabled": True},
        exports={},
    )
    result = image_cluster.run(settings, yes=True)
    assert result["n_clusters"] == 0 and result["n_noise"] == 14 and result["verdict"] == "FAIL"
    assert "all images are noise" in result["reasons"][0]
    assert len(list((tmp_path / "out" / "noise").rglob("*.png"))) == 14
    config = tmp_path / "config.yaml"
    config.write_text(settings_to_yaml(settings))
    assert main("--config", str(config), "purity.fail_on_fail=true") == 1
    assert "the purity verdict is FAIL" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "image_size", "dtype"), [
    ("dinov2", 224, "float32"), ("dinov2", 518, "bfloat16"), ("resnet", 224, "bfloat16"), ("resnet", 518, "float32"),
])  # fmt: skip
def test_the_whole_run_with_a_local_network(tmp_path, kind, image_size, dtype):
    write_stripes(tmp_path / "in", n=6)
    name = (tiny_dinov2 if kind == "dinov2" else tiny_resnet)(tmp_path / "model")
    model = {"name": name, "image_size": image_size, "dtype": dtype, "device": "cpu", "num_workers": 2, "batch_size": 4}
    result = image_cluster.run(small_settings(tmp_path, model=model, purity={"truth": "parent_folder"}))
    assert result["n_images"] == 12 and result["n_bad"] == 0
    table = pq.read_table(tmp_path / "out" / "clusters.parquet")
    assert table.num_rows == 12 and np.isfinite(table["x"].to_numpy()).all()


def test_a_second_run_after_a_move_has_nothing_to_do_and_undo_says_what_it_left(stripes_dir, tmp_path, capsys):
    before, places = contents(stripes_dir), sorted(path for path in stripes_dir.rglob("*") if path.is_file())
    settings = small_settings(tmp_path, mode="move")
    assert image_cluster.run(settings, yes=True)["files"]["n_changed"] == 24
    assert contents(stripes_dir) == Counter() and contents(tmp_path / "out") == before
    assert image_cluster.run(settings, yes=True)["files"] == {"stage": "finished", "n_changed": 0}
    config = tmp_path / "config.yaml"
    config.write_text(settings_to_yaml(settings))
    taken = places[0]
    taken.parent.mkdir(parents=True, exist_ok=True)
    taken.write_bytes(b"another file of that name")
    assert main("--config", str(config), "--undo") == 1  # one file could not go back
    assert "one file was not put back, the others were" in capsys.readouterr().err
    taken.unlink()
    assert main("--config", str(config), "--undo") == 0
    assert contents(stripes_dir) == before


def test_a_second_run_at_the_same_time_is_turned_away(stripes_dir, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(settings_to_yaml(small_settings(tmp_path)))
    with OutputLock(tmp_path / "out"):
        assert main("--config", str(config)) == 75
    assert "being written by" in capsys.readouterr().err


def test_check_writes_nothing(stripes_dir, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(settings_to_yaml(small_settings(tmp_path)))
    before = sorted(tmp_path.rglob("*"))
    assert main("--config", str(config), "--check") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 24 and sorted(tmp_path.rglob("*")) == before
    assert main("--config", str(config), "--check", "input_dir=/nowhere") == 1


@pytest.mark.parametrize("flag", ["--undo", "--resume"])
def test_undo_and_resume_without_anything_sorted(stripes_dir, tmp_path, capsys, flag):
    config = tmp_path / "config.yaml"
    config.write_text(settings_to_yaml(small_settings(tmp_path)))
    assert main("--config", str(config), flag) == 1
    assert "no files were sorted" in capsys.readouterr().err


def test_a_separate_noise_folder_and_yolo_layout(stripes_dir, tmp_path):
    settings = small_settings(
        tmp_path,
        clustering={"min_cluster_size": 5, "min_samples": 2, "noise_handling": "separate"},
        annotations={"layout": "ultralytics"},
        mode="hardlink",
    )
    result = image_cluster.run(settings, yes=True)
    placed = [path for path in (tmp_path / "out").rglob("*.png") if path.is_file()]
    assert len(placed) == result["files"]["n_images"] == 24
    assert all(path.stat().st_nlink == 2 for path in placed)

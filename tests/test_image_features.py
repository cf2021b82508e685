"""Features: equal content costs once, bad files shift nobody, a kill loses at most one shard."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.config import UserError, settings_from_values
from image_parts.cache import FeatureCache, RowKeys
from image_parts.decode import read_image
from image_parts.extractors import HogExtractor
from image_parts.features import extract_features
from image_parts.preparation import map_ahead
from image_parts.preprocess import prepare_image
from image_parts.scan import scan_images
from image_parts.settings import ImageSettings
from tests.image_files import encode, encode_deep, picture, tiny_dinov2, tiny_resnet

ROOT = Path(__file__).parent.parent


def settings_for(tmp_path: Path, **sections) -> ImageSettings:
    values = {
        "input_dir": str(tmp_path / "in"),
        "output_dir": str(tmp_path / "out"),
        "progress": False,
        "model": {"name": "hog", "image_size": 32, "num_workers": 1, **sections.pop("model", {})},
        "cache": {"cache_dir": str(tmp_path / "cache"), **sections.pop("cache", {})},
        **sections,
    }
    return settings_from_values(ImageSettings, values, source="test")


def extract(settings: ImageSettings):
    scanned = scan_images(Path(settings.input_dir), extensions=settings.image_extensions, cache_dir=None, n_workers=1)
    return extract_features(scanned, settings)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve different images, with a truncated one in the middle and two copies of the first."""
    (tmp_path / "in").mkdir()
    for number in range(12):
        (tmp_path / "in" / f"{number:02d}.png").write_bytes(encode(picture(seed=number), "PNG"))
    shutil.copy(tmp_path / "in" / "00.png", tmp_path / "in" / "06_copy.png")
    shutil.copy(tmp_path / "in" / "00.png", tmp_path / "in" / "99_copy.png")
    content = encode(picture(seed=50), "PNG")
    (tmp_path / "in" / "05_broken.png").write_bytes(content[: len(content) // 2])
    return tmp_path


def expected_vector(path: Path, settings: ImageSettings) -> np.ndarray:
    planes = prepare_image(read_image(path), settings.preprocessing, image_size=settings.model.image_size)
    vector = HogExtractor(settings.model).embed(planes[None])[0]
    return vector / np.linalg.norm(vector)


def test_features_in_a_file_are_those_in_memory(folder, monkeypatch):
    """As for many images: computed or read from the cache, merged and normalised, and given back after each piece."""
    in_memory = extract(settings_for(folder))
    monkeypatch.setattr("common.mapped._LEAST_BYTES", 0)
    for name in ("_PIECE_ROWS", "_RELEASED_ROWS"):
        monkeypatch.setattr(f"image_parts.features.{name}", 5)
    for cache in ("new", "new", "none"):  # computed, read from the cache, computed without one
        given = {"cache_dir": str(folder / cache), "enabled": cache != "none"}
        features = extract(settings_for(folder, cache=given))
        assert np.array_equal(features.vectors, in_memory.vectors)
        assert np.array_equal(features.rows, in_memory.rows) and features.bad == in_memory.bad
    assert list((folder / "out").iterdir()) == []  # the file had no name


def test_every_image_has_its_own_vector_and_none_is_shifted(folder):
    settings = settings_for(folder)
    for _ in ("computed", "cached"):
        features = extract(settings)
        assert [bad.relative_path for bad in features.bad] == ["05_broken.png"]
        assert "truncated" in features.bad[0].reason
        assert len(features.records) == 14 and features.vectors.shape[0] == 12
        for record, row in zip(features.records, features.rows, strict=True):
            np.testing.assert_allclose(features.vectors[row], expected_vector(record.path, settings), atol=1e-6)
    assert (features.n_cached, features.n_computed) == (12, 0)


def test_new_images_cost_only_themselves(folder):
    settings = settings_for(folder)
    first = extract(settings)
    (folder / "in" / "03_new.png").write_bytes(encode(picture(seed=200), "PNG"))
    (folder / "in" / "moved").mkdir()
    (folder / "in" / "01.png").rename(folder / "in" / "moved" / "other_name.png")
    second = extract(settings)
    assert (second.n_cached, second.n_computed) == (12, 1)
    moved = next(i for i, record in enumerate(second.records) if record.relative_path == "moved/other_name.png")
    old = next(i for i, record in enumerate(first.records) if record.relative_path == "01.png")
    assert np.array_equal(second.vectors[second.rows[moved]], first.vectors[first.rows[old]])


@pytest.mark.parametrize(("change", "n_computed"), [
    ({"preprocessing": {"trim_top": 0.1}}, 12),
    ({"preprocessing": {"polarity_invariant": False}}, 12),
    ({"model": {"image_size": 48}}, 12),
    ({"model": {"hog_orientations": 5}}, 12),
    ({"preprocessing": {"l2_normalize": False}}, 0),
    ({"preprocessing": {"clahe": True, "equalization": "clahe"}}, 0),
    ({"clustering": {"min_cluster_size": 11}}, 0),
    ({"model": {"batch_size": 5}}, 0),
])  # fmt: skip
def test_what_changes_vectors_recomputes_and_nothing_else(folder, change, n_computed):
    extract(settings_for(folder))
    assert extract(settings_for(folder, **change)).n_computed == n_computed


def test_the_same_picture_in_other_bytes_shares_a_row(folder):
    (folder / "in" / "00_same.bmp").write_bytes(encode(picture(seed=0), "BMP"))
    features = extract(settings_for(folder))
    rows = {record.relative_path: row for record, row in zip(features.records, features.rows, strict=True)}
    assert rows["00_same.bmp"] == rows["00.png"] == rows["99_copy.png"] == 0
    assert sorted(set(features.rows)) == list(range(len(features.vectors))) == list(range(12))
    np.testing.assert_allclose(
        features.vectors[rows["11.png"]], expected_vector(folder / "in" / "11.png", settings_for(folder)), atol=1e-6
    )


def test_without_l2_the_lengths_stay(folder):
    plain = extract(settings_for(folder, preprocessing={"l2_normalize": False}))
    unit = extract(settings_for(folder))
    lengths = np.linalg.norm(plain.vectors, axis=1, keepdims=True)
    assert lengths.std() > 0
    np.testing.assert_allclose(unit.vectors, plain.vectors / lengths, atol=1e-6)


def test_the_cache_can_be_off(folder):
    settings = settings_for(folder, cache={"enabled": False})
    extract(settings)
    assert extract(settings).n_computed == 12 and not (folder / "cache").exists()


def test_deep_images_are_computed_again_when_the_range_of_the_data_set_grows(tmp_path):
    (tmp_path / "in").mkdir()
    ramp = np.tile(np.arange(0, 640, 10, dtype=np.uint16), (48, 1))
    (tmp_path / "in" / "a.png").write_bytes(encode_deep(ramp, ".png"))
    (tmp_path / "in" / "b.png").write_bytes(encode(picture(), "PNG"))
    settings = settings_for(tmp_path)
    assert extract(settings).n_computed == 2
    (tmp_path / "in" / "c.png").write_bytes(encode_deep(ramp * 3, ".png"))
    assert extract(settings).n_computed == 2  # a and c; b has 8 bits and stays


def test_damaged_shards_are_passed_over_and_their_images_computed_again(folder):
    settings = settings_for(folder)
    first = extract(settings)
    shard = next((folder / "cache").rglob("part-*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF  # one flipped bit pattern among the vectors: only the checksum can tell
    shard.write_bytes(content)
    (shard.parent / "part-00000000000000000000-zzz.parquet").write_bytes(b"half a shard")
    second = extract(settings)
    assert second.n_computed == 12 and np.array_equal(first.vectors, second.vectors)


def test_a_cache_shared_by_two_folders(folder):
    extract(settings_for(folder))
    shutil.copytree(folder / "in", folder / "second")
    settings = settings_for(folder, input_dir=str(folder / "second"))
    assert extract(settings).n_computed == 0


def test_nothing_readable_is_an_error_that_shows_a_reason(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 1 files.*a\.png: the file is empty"):
        extract(settings_for(tmp_path))
    content = encode(picture(), "PNG")
    (tmp_path / "in" / "a.png").write_bytes(content[:200])
    with pytest.raises(UserError, match=r"a\.png: damaged"):
        extract(settings_for(tmp_path))


def test_a_file_that_vanishes_after_the_scan_is_reported(folder):
    settings = settings_for(folder)
    scanned = scan_images(folder / "in", extensions=(".png",), cache_dir=None, n_workers=1)
    (folder / "in" / "04.png").unlink()
    features = extract_features(scanned, settings)
    assert ("04.png", "cannot be read: No such file or directory") in [
        (bad.relative_path, bad.reason) for bad in features.bad
    ]


def test_worker_processes_give_the_same_bytes(folder, monkeypatch):
    monkeypatch.setattr("image_parts.preparation._MIN_IMAGES_FOR_PROCESSES", 4)
    alone = extract(settings_for(folder, cache={"enabled": False}))
    together = extract(settings_for(folder, cache={"enabled": False}, model={"num_workers": 2}))
    assert np.array_equal(alone.vectors, together.vectors) and alone.bad == together.bad


@pytest.mark.parametrize("kind", ["dinov2", "resnet"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_networks_cache_and_bad_images(folder, kind, dtype):
    name = (tiny_dinov2 if kind == "dinov2" else tiny_resnet)(folder / "model")
    model = {"name": name, "image_size": 56, "device": "cpu", "dtype": dtype, "batch_size": 5, "num_workers": 2}
    first = extract(settings_for(folder, model=model))
    assert first.vectors.shape == (12, 32 if kind == "dinov2" else 24)
    assert first.vectors.dtype == np.float32
    assert [bad.relative_path for bad in first.bad] == ["05_broken.png"]
    second = extract(settings_for(folder, model={**model, "batch_size": 3}))
    assert second.n_computed == 0 and np.array_equal(first.vectors, second.vectors)


def test_workers_run_ahead_only_so_far():
    from concurrent.futures import ThreadPoolExecutor

    started: list[int] = []
    with ThreadPoolExecutor(4) as executor:
        results = map_ahead(lambda item: started.append(item) or item, range(100), executor, n_ahead=6)
        for expected in range(10):
            assert next(results) == expected
        time.sleep(0.05)
        assert len(started) <= 16
        results.close()


def test_a_kill_in_the_middle_keeps_all_finished_shards(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(60):
        (tmp_path / "in" / f"{number:02d}.png").write_bytes(encode(picture(seed=number), "PNG"))
    script = (
        "import image_parts.cache as cache; cache._SHARD_ROWS = 5\n"
        "from tests.test_image_features import extract, settings_for\n"
        "from pathlib import Path; import sys, time\n"
        "import image_parts.preparation as p; prepare = p.prepare_image\n"
        "p.prepare_image = lambda *a, **k: (time.sleep(0.03), prepare(*a, **k))[1]\n"
        "extract(settings_for(Path(sys.argv[1])))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env={**os.environ})
    while len(list((tmp_path / "cache").rglob("part-*.parquet"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    n_shards = len(list((tmp_path / "cache").rglob("part-*.parquet")))
    assert 2 <= n_shards < 12
    features = extract(settings_for(tmp_path))
    assert features.n_cached == 5 * n_shards and features.n_computed == 60 - features.n_cached
    fresh = extract(settings_for(tmp_path, cache={"enabled": False}))
    assert np.array_equal(features.vectors, fresh.vectors)


def test_an_exception_keeps_what_was_computed(folder, monkeypatch):
    calls = []

    def fail_late(*arguments, **options):
        calls.append(1)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return prepare_image(*arguments, **options)

    monkeypatch.setattr("image_parts.preparation.prepare_image", fail_late)
    with pytest.raises(KeyboardInterrupt):
        extract(settings_for(folder))
    monkeypatch.undo()
    assert extract(settings_for(folder)).n_cached == 7  # of the first task of eight images, one of them broken


def test_cache_ignores_vectors_of_another_length(tmp_path):
    cache = FeatureCache(tmp_path, {"key": 1})
    with cache.writer(3) as writer:
        writer.add("a", np.ones(3, np.float32))
    vectors = np.zeros((1, 4), np.float32)
    assert not cache.read_into(vectors, RowKeys.of(["a"])[0]).any()
    assert cache.dimension() == 3 and FeatureCache(tmp_path, {"key": 2}).dimension() is None


def test_row_keys_are_numbered_as_they_first_come():
    keys, rows = RowKeys.of(["d", "b", "d", "a", "b"])
    assert rows.tolist() == [0, 1, 0, 2, 1] and len(keys) == 3
    assert keys.find(["a", "b", "c", "d"]).tolist() == [2, 1, -1, 0]
    assert RowKeys.of([])[0].find(["a"]).tolist() == [-1]

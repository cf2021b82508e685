"""Finding images: every folder once, in one order, and nothing read twice that did not change."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import image_parts.scan as scan_module
from common.config import UserError
from image_parts.records import relative_paths
from image_parts.scan import check_folders, list_images, scan_images
from tests.image_files import encode, encode_deep, picture

EXTENSIONS = (".png", ".jpg")


def scan(folder: Path, cache_dir: Path | None = None):
    return scan_images(folder, extensions=EXTENSIONS, cache_dir=cache_dir, n_workers=2)


def put(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(picture(seed=seed), "PNG"))
    return path


def test_images_come_sorted_from_all_folders_and_any_case(tmp_path):
    for name in ("b/2.PNG", "b/1.png", "a/c/9.jpg", "z.Jpg", "a.png", "a/notes.txt"):
        put(tmp_path / name)
    found = scan(tmp_path)
    assert [record.relative_path for record in found.records] == ["a.png", "a/c/9.jpg", "b/1.png", "b/2.PNG", "z.Jpg"]
    record = found.records[0]
    assert (record.width, record.height, record.is_deep) == (64, 48, False)
    assert record.n_bytes == (tmp_path / "a.png").stat().st_size
    assert found.bad == [] and found.value_range is None


def test_names_of_every_kind(tmp_path):
    names = ["new\nline.png", "quote'\".png", "<script>.png", "x" * 251 + ".png", "кот.png", " .png"]
    for seed, name in enumerate(names):
        put(tmp_path / name, seed)
    foreign = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(foreign)).write_bytes(encode(picture(seed=99), "PNG"))
    found = scan(tmp_path, tmp_path / "cache")
    assert len(found.records) == len(names) + 1
    again = scan(tmp_path, tmp_path / "cache")
    assert again == found  # the index keeps names that are not UTF-8
    odd = next(record for record in found.records if record.relative_path.startswith("caf"))
    assert odd.shown_path == "caf\\xe9.png" and odd.path.exists()


def test_links_are_followed_once_and_loops_survived(tmp_path):
    put(tmp_path / "in" / "real" / "1.png")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "real")
    (tmp_path / "in" / "real" / "up").symlink_to(tmp_path / "in")
    put(tmp_path / "elsewhere" / "2.png", 2)
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "single.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "in" / "dead.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "in" / "circle.png").symlink_to(tmp_path / "in" / "circle.png")
    found = scan(tmp_path / "in")
    names = [record.relative_path for record in found.records]
    assert sorted(Path(name).name for name in names) == ["1.png", "2.png", "single.png"]
    assert [(bad.relative_path, bad.reason) for bad in found.bad] == [
        ("circle.png", "a link to nothing"),
        ("dead.png", "a link to nothing"),
    ]


def test_images_come_in_the_order_of_the_bytes_of_their_paths(tmp_path):
    names = ["a-b/1.png", "a.png", "a/1.png", "a/b/1.png", "a/b.png", "ab/1.png", "B.png", "ä/1.png"]
    for seed, name in enumerate(names):
        put(tmp_path / name, seed)
    found = [record.relative_path for record in scan(tmp_path).records]
    assert found == sorted(names, key=os.fsencode)


def test_what_is_no_file_is_listed_and_never_read(tmp_path, caplog):
    """Pipes, sockets and devices, also behind links: to read a pipe is to wait for ever."""
    folder = tmp_path / "in"
    put(folder / "a.png")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "no_image")  # not named like one: passed over, as other files are
    (folder / "link.png").symlink_to(folder / "pipe.png")
    (folder / "null.png").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket.png"))
        with caplog.at_level("INFO", "image_parts"):
            found = scan(folder)
    assert [record.relative_path for record in found.records] == ["a.png"]
    assert [(bad.relative_path, bad.reason) for bad in found.bad] == [
        ("link.png", "a pipe, not a file"),
        ("null.png", "a device, not a file"),
        ("pipe.png", "a pipe, not a file"),
        ("socket.png", "a socket, not a file"),
    ]
    assert "scan: 1 images, 4 files or folders unreadable" in caplog.text


def test_broken_files_are_listed_with_a_reason(tmp_path):
    put(tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    found = scan(tmp_path)
    assert [record.relative_path for record in found.records] == ["good.png"]
    reasons = {bad.relative_path: bad.reason for bad in found.bad}
    assert reasons["empty.png"] == "the file is empty" and "not an image" in reasons["text.jpg"]


def test_an_unreadable_folder_is_listed(tmp_path, monkeypatch, caplog):
    put(tmp_path / "good.png")
    put(tmp_path / "closed" / "hidden.png")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(scan_module.os, "scandir", refuse)  # root may read everything, so modes cannot test this
    with caplog.at_level("INFO", "image_parts"):
        found = scan(tmp_path)
    assert "scan: 1 images, 1 files or folders unreadable" in caplog.text
    assert [(bad.relative_path, bad.reason) for bad in found.bad] == [
        ("closed", "the folder cannot be read: Permission denied")
    ]
    assert len(found.records) == 1


def test_the_index_is_used_until_a_file_changes(tmp_path, monkeypatch):
    folder, cache = tmp_path / "in", tmp_path / "cache"
    for number in range(4):
        put(folder / f"{number}.png", number)
    first = scan(folder, cache)
    read: list[str] = []
    original = scan_module.read_content
    monkeypatch.setattr(scan_module, "read_content", lambda path: read.append(path.name) or original(path))
    assert scan(folder, cache) == first and read == []
    put(folder / "1.png", 77)
    os.utime(folder / "1.png", ns=(1, 1))
    put(folder / "new.png", 78)
    (folder / "2.png").unlink()
    changed = scan(folder, cache)
    assert sorted(read) == ["1.png", "new.png"]
    assert [record.relative_path for record in changed.records] == ["0.png", "1.png", "3.png", "new.png"]
    assert changed.records[1].sha256 != first.records[1].sha256
    index = next(cache.glob("image_index_*.parquet"))
    assert pq.read_table(index)["name"].to_pylist() == [b"0.png", b"1.png", b"3.png", b"new.png"]


def test_what_is_wrong_with_a_file_is_kept_in_the_index(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "c.png"):
        (tmp_path / "in" / name).write_text(f"no image, but {name}")
    put(tmp_path / "in" / "b.png")
    (tmp_path / "in" / "d.png").write_bytes(encode_deep(np.array([[7, 900]], np.uint16), ".png"))
    first = scan(tmp_path / "in", tmp_path / "cache")
    monkeypatch.setattr(scan_module, "read_content", lambda path: pytest.fail(f"{path} is read again"))
    assert scan(tmp_path / "in", tmp_path / "cache") == first
    assert [bad.relative_path for bad in first.bad] == ["a.png", "c.png"] and first.value_range == (7, 900)


def test_a_table_of_images_is_a_sequence_of_records(tmp_path):
    for number in range(5):
        put(tmp_path / f"{number}.png", number)
    table = scan(tmp_path).records
    names = [f"{number}.png" for number in range(5)]
    assert [record.relative_path for record in table] == list(relative_paths(table)) == names
    assert [record.relative_path for record in table[1:4]] == names[1:4] and table[-1] == table[4]
    assert table[2].path.read_bytes() == encode(picture(seed=2), "PNG")
    assert [record.relative_path for record in table.take(np.array([3, 1]))] == ["3.png", "1.png"]
    assert table.take(np.arange(5)) is table and table.take(np.arange(4)) != table
    with pytest.raises(IndexError):
        table[5]


@pytest.mark.parametrize("damage", ["empty", "cut", "columns", "text"])
def test_a_damaged_index_is_made_anew(tmp_path, damage):
    put(tmp_path / "in" / "a.png")
    first = scan(tmp_path / "in", tmp_path / "cache")
    index = next((tmp_path / "cache").glob("image_index_*.parquet"))
    whole = index.read_bytes()
    index.write_bytes({"empty": b"", "cut": whole[:-9], "text": b"[]"}.get(damage, b""))
    if damage == "columns":
        pq.write_table(pa.table({"name": [b"a.png"]}), index)
    assert scan(tmp_path / "in", tmp_path / "cache") == first
    assert pq.read_table(index)["name"].to_pylist() == [b"a.png"]


def test_the_value_range_spans_all_deep_images(tmp_path):
    for name, low, high in (("a.png", 100, 900), ("b.png", 40, 500)):
        (tmp_path / name).write_bytes(encode_deep(np.array([[low, high]], np.uint16), ".png"))
    put(tmp_path / "c.png")
    found = scan(tmp_path)
    assert found.value_range == (40, 900)
    assert [record.is_deep for record in found.records] == [True, True, False]


def test_no_images_says_what_is_there(tmp_path):
    with pytest.raises(UserError, match=r"empty"):
        scan(tmp_path)
    for number in range(3):
        (tmp_path / f"{number}.tif").write_bytes(b"x")
    with pytest.raises(UserError, match=r"\.tif \(3\).*image_extensions"):
        scan(tmp_path)
    with pytest.raises(UserError, match=r"\.tif \(3\)"):
        list_images(tmp_path, extensions=EXTENSIONS)


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "alias").symlink_to(folder)
    cases = [
        ("", "out", "input_dir is empty"),
        (folder, "", "output_dir is empty"),
        (tmp_path / "absent", "out", "does not exist"),
        (tmp_path / "file", "out", "is a file"),
        (folder, folder, "same folder"),
        (folder, tmp_path / "alias", "same folder"),
        (folder, folder / "out", "inside input_dir"),
        (folder, tmp_path / "alias" / "deep" / "out", "inside input_dir"),
        (folder, tmp_path, "inside output_dir"),
    ]
    for source, target, message in cases:
        with pytest.raises(UserError, match=message):
            check_folders(str(source), str(target))
    assert check_folders(str(tmp_path / "alias"), str(tmp_path / "out")) == (folder, tmp_path / "out")

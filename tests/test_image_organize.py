"""The file stage loses and overwrites nothing, whatever happens; killed anywhere, it is finished or undone."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from dataclasses import replace
from pathlib import Path
from unittest import mock

import cloudpickle
import numpy as np
import pytest
import yaml

from common.commit import LockHeld
from common.config import UserError
from image_parts import moves
from image_parts.actions import ActionDraft
from image_parts.journal import Journal
from image_parts.naming import StemGiver, Wanted, collision_key
from image_parts.organize import find_stage, organize, resume, undo
from image_parts.plan import read_plan, write_plan
from image_parts.plan_check import check_plan
from image_parts.planner import plan_files
from image_parts.records import ClusteredImages, ImageRecord
from image_parts.settings import AnnotationSettings

DATA_DIR = Path(os.environ.get("CLUSTERING_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))
OLD_NS = 1_500_000_000_123_456_789  # a time of change that only a careful copy keeps


# --- What the tests are made of --------------------------------------------------------------------------------------


def write_file(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(OLD_NS, OLD_NS + len(content)))


def record_of(path, input_dir):
    state = path.stat()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return ImageRecord(path, str(path.relative_to(input_dir)), sha256, 8, 8, state.st_size, state.st_mtime_ns)


def clustered_images(input_dir, labels_by_name, *, suffixes=(".jpg", ".png")):
    """Cluster the images below a folder by a mapping from relative path to label; all others go to cluster 0."""
    paths = sorted(path for path in input_dir.rglob("*") if path.suffix.lower() in suffixes)
    records = [record_of(path, input_dir) for path in paths]
    labels = np.array([labels_by_name.get(record.relative_path, 0) for record in records], dtype=np.int64)
    n = len(records)
    floats = np.zeros(n, np.float32)
    return ClusteredImages(records, labels, labels, floats, floats, np.zeros((n, 3), np.float32))


def plan_of(input_dir, output_dir, *, mode="copy", labels=None, other_images=(), **annotations):
    return plan_files(
        clustered_images(input_dir, labels or {}),
        input_dir=input_dir,
        output_dir=output_dir,
        mode=mode,
        annotations=AnnotationSettings(**annotations),
        other_images=other_images,
    )


def tree(folder, *, without=("plan.jsonl", "journal.jsonl")):
    """Every file below a folder: relative path -> (sha256, time of change, mode)."""
    files = {}
    for parent, _, names in os.walk(os.fsencode(folder)):
        for name in names:
            path = os.path.join(parent, name)
            relative = os.fsdecode(os.path.relpath(path, os.fsencode(folder)))
            if relative in without:
                continue
            state = os.lstat(path)
            content = os.readlink(path) if os.path.islink(path) else Path(os.fsdecode(path)).read_bytes()
            files[relative] = (hashlib.sha256(content).hexdigest(), state.st_mtime_ns, state.st_mode)
    return files


@pytest.fixture
def small(tmp_path):
    """Two folders of equal names with labels, a class list, and an image without label."""
    source = tmp_path / "in"
    for folder in ("a", "b"):
        write_file(source / folder / "img" / "0001.jpg", f"image {folder}".encode())
        write_file(source / folder / "lab" / "0001.txt", f"0 0.5 0.5 0.1 0.1 {folder}\n".encode())
    write_file(source / "b" / "img" / "0002.png", b"no label here")
    write_file(source / "classes.txt", b"cell\n")
    return source


@pytest.fixture
def other_disk():
    """A folder on another file system than the temporary folder of the tests."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("there is no second file system here")
    folder = Path(tempfile.mkdtemp(dir=shm))
    yield folder
    shutil.rmtree(folder)


# --- Where files go --------------------------------------------------------------------------------------------------


def test_image_and_label_share_a_stem_when_names_collide(small, tmp_path):
    plan = plan_of(small, tmp_path / "out")
    report = organize(plan)
    images = sorted(path.stem for path in (tmp_path / "out/cluster_000/img").iterdir())
    labels = sorted(path.stem for path in (tmp_path / "out/cluster_000/lab").iterdir())
    assert images[0] == labels[0] == "0001" and images[1] == labels[1] and images[1].startswith("0001__")
    for stem in labels:
        letter = (tmp_path / f"out/cluster_000/img/{stem}.jpg").read_text()[-1]
        assert (tmp_path / f"out/cluster_000/lab/{stem}.txt").read_text().strip().endswith(letter)
    assert (tmp_path / "out/classes.txt").read_bytes() == b"cell\n"
    assert report.labels == {
        "found": 2,
        "empty": 0,
        "missing": 1,
        "unusable": 0,
        "orphan": 0,
        "shared": 0,
        "linked": 0,
    }
    assert (report.n_images, report.n_labels, report.n_renamed, report.n_changed) == (3, 2, 1, 6)


def test_copies_keep_content_time_and_mode(small, tmp_path):
    (small / "b/img/0002.png").chmod(0o640)
    organize(plan_of(small, tmp_path / "out", labels={"b/img/0002.png": -1}))
    state = (tmp_path / "out/noise/img/0002.png").stat()
    assert state.st_mtime_ns == OLD_NS + len(b"no label here") and state.st_mode & 0o777 == 0o640


@pytest.mark.parametrize("mode", ["copy", "move", "hardlink", "symlink"])
def test_every_mode_places_the_same_files_and_undo_restores(small, tmp_path, mode):
    before = tree(small)
    plan = plan_of(small, tmp_path / "out", mode=mode, labels={"b/img/0002.png": -1})
    organize(plan)
    out = tmp_path / "out"
    contents = sorted(path.read_bytes() for path in out.rglob("*") if path.is_file() and "json" not in path.suffix)
    assert contents == sorted(path_bytes for path_bytes in read_all(small, plan))
    assert (tree(small) == before) == (mode != "move")
    assert undo(out).stage == "undone"
    assert tree(small) == before and tree(out) == {} and [p.name for p in out.iterdir() if p.is_dir()] == []


def read_all(source, plan):
    """The contents that the plan names, from wherever they are now."""
    for action in plan.actions:
        path = Path(action.source)
        yield (path if path.exists() else Path(plan.output_dir) / action.target).read_bytes()


def test_labels_are_searched_from_the_end_of_the_path(tmp_path):
    source = tmp_path / "img" / "set" / "img" / "deep"  # two folders of that name: the last one counts
    write_file(source / "x.jpg", b"x")
    write_file(tmp_path / "img" / "set" / "lab" / "deep" / "x.txt", b"0 1 1 1 1")
    write_file(tmp_path / "lab" / "set" / "img" / "deep" / "x.txt", b"the wrong one")
    plan = plan_of(tmp_path / "img", tmp_path / "out")
    assert [action.sha256 for action in plan.actions if action.role == "label"] == [
        hashlib.sha256(b"0 1 1 1 1").hexdigest()
    ]


def test_labels_beside_images_are_found(tmp_path):
    write_file(tmp_path / "in/x.jpg", b"x")
    write_file(tmp_path / "in/x.txt", b"0 1 1 1 1")
    write_file(tmp_path / "in/y.txt", b"no image")
    plan = plan_of(tmp_path / "in", tmp_path / "out")
    assert (plan.labels.found, plan.labels.orphan) == (1, 1)


def test_missing_empty_orphan_and_unusable_labels_are_counted_apart(tmp_path):
    for name in ("found", "empty", "blank", "missing", "broken", "folder", "pipe"):
        write_file(tmp_path / f"in/img/{name}.jpg", name.encode())
    lab = tmp_path / "in/lab"
    write_file(lab / "found.txt", b"0 1 1 1 1")
    write_file(lab / "empty.txt", b"")
    write_file(lab / "blank.txt", b" \n\n")
    (lab / "broken.txt").symlink_to(tmp_path / "nowhere")
    (lab / "folder.txt").mkdir()
    os.mkfifo(lab / "pipe.txt")
    write_file(lab / "orphan.txt", b"0 1 1 1 1")
    write_file(lab / "bad.txt", b"its image cannot be read")
    write_file(lab / "classes.txt", b"cell")
    plan = plan_of(tmp_path / "in", tmp_path / "out", other_images=[tmp_path / "in/img/bad.jpg"])
    labels = plan.labels
    assert (labels.found, labels.empty, labels.missing, labels.unusable, labels.orphan) == (1, 2, 1, 3, 1)
    assert plan.count("label") == 3  # an empty label says that there is nothing in the image: it travels too
    assert organize(plan).n_changed == 7 + 3 + 1


def test_linked_labels_and_images_are_copied_as_content_and_stay(tmp_path):
    write_file(tmp_path / "in/img/x.jpg", b"x")
    write_file(tmp_path / "elsewhere/x.txt", b"0 1 1 1 1")
    write_file(tmp_path / "elsewhere/y.jpg", b"y")
    (tmp_path / "in/lab").mkdir()
    (tmp_path / "in/lab/x.txt").symlink_to(tmp_path / "elsewhere/x.txt")
    (tmp_path / "in/img/y.jpg").symlink_to("../../elsewhere/y.jpg")
    before = tree(tmp_path / "elsewhere")
    plan = plan_of(tmp_path / "in", tmp_path / "out", mode="move")
    organize(plan)
    assert (plan.labels.linked, plan.n_linked_images) == (1, 1)
    for name, content in (("lab/x.txt", b"0 1 1 1 1"), ("img/y.jpg", b"y")):
        target = tmp_path / "out/cluster_000" / name
        assert target.read_bytes() == content and not target.is_symlink()
    assert (tmp_path / "in/lab/x.txt").is_symlink() and tree(tmp_path / "elsewhere") == before
    assert not (tmp_path / "in/img/x.jpg").exists()


def test_a_link_to_a_file_that_would_be_moved_away_stops_a_move_before_it_begins(tmp_path):
    write_file(tmp_path / "in/img/x.jpg", b"x")
    (tmp_path / "in/img/y.jpg").symlink_to("x.jpg")
    before = tree(tmp_path / "in")
    with pytest.raises(UserError, match=r"(?s)none was touched.*y\.jpg' leads to .*x\.jpg', which would be moved"):
        organize(plan_of(tmp_path / "in", tmp_path / "out", mode="move"))
    assert tree(tmp_path / "in") == before and not list((tmp_path / "out").glob("cluster_*"))
    organize(plan_of(tmp_path / "in", tmp_path / "out", mode="copy"))
    assert (tmp_path / "out/cluster_000/img/y.jpg").read_bytes() == b"x"


def test_what_lies_behind_a_linked_folder_is_copied_and_stays(tmp_path):
    write_file(tmp_path / "elsewhere/img/x.jpg", b"x")
    write_file(tmp_path / "elsewhere/lab/x.txt", b"0 1 1 1 1")
    write_file(tmp_path / "in/img/y.jpg", b"y")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path / "elsewhere")
    records = [record_of(tmp_path / "in" / name, tmp_path / "in") for name in ("img/y.jpg", "linked/img/x.jpg")]
    nothing, floats = np.zeros(2, np.int64), np.zeros(2, np.float32)
    clustered = ClusteredImages(records, nothing, nothing, floats, floats, np.zeros((2, 3), np.float32))
    plan = plan_files(
        clustered,
        input_dir=tmp_path / "in",
        output_dir=tmp_path / "out",
        mode="move",
        annotations=AnnotationSettings(),
    )
    organize(plan)
    assert (plan.n_linked_images, plan.labels.linked) == (1, 1)
    assert (tmp_path / "out/cluster_000/lab/x.txt").exists() and not (tmp_path / "in/img/y.jpg").exists()
    assert tree(tmp_path / "elsewhere") == before


def test_a_label_of_two_images_is_copied_to_both(tmp_path):
    write_file(tmp_path / "in/img/x.jpg", b"jpg")
    write_file(tmp_path / "in/img/x.png", b"png")
    write_file(tmp_path / "in/lab/x.txt", b"0 1 1 1 1")
    plan = plan_of(tmp_path / "in", tmp_path / "out", mode="move", labels={"img/x.png": 1})
    organize(plan)
    assert plan.labels.shared == 2
    for cluster in ("cluster_000", "cluster_001"):
        assert (tmp_path / "out" / cluster / "lab/x.txt").read_bytes() == b"0 1 1 1 1"
    assert (tmp_path / "in/lab/x.txt").exists() and not (tmp_path / "in/img/x.jpg").exists()


def test_ultralytics_layout_opens_by_its_own_rule(small, tmp_path):
    write_file(small / "data.yaml", b"names: {0: cell, 1: dust}\ntrain: somewhere\n")
    organize(plan_of(small, tmp_path / "out", layout="ultralytics", labels={"b/img/0002.png": 1}))
    data = yaml.safe_load((tmp_path / "out/data.yaml").read_text())
    assert data["names"] == {0: "cell", 1: "dust"}
    images = sorted((tmp_path / "out" / data["train"]).rglob("*.*"))
    assert len(images) == 3
    # The rule of Ultralytics: the last /images/ becomes /labels/, the extension .txt.
    found = [Path("/labels/".join(str(path).rsplit("/images/", 1))).with_suffix(".txt") for path in images]
    assert sum(path.exists() for path in found) == 2


def test_class_lists_that_contradict_each_other_are_refused(small, tmp_path):
    write_file(small / "b/lab/classes.txt", b"something else\n")
    with pytest.raises(UserError, match="list different classes"):
        plan_of(small, tmp_path / "out")
    write_file(small / "b/lab/classes.txt", b"cell\n\n")  # the same classes
    plan_of(small, tmp_path / "out")


def test_annotations_switched_off_touch_no_label(small, tmp_path):
    plan = plan_of(small, tmp_path / "out", enabled=False)
    assert plan.count("label") == 0 and plan.count("classes") == 0


# --- Names -----------------------------------------------------------------------------------------------------------


def assign_stems(wanted, *, max_bytes):
    stems = StemGiver(max_bytes=max_bytes)
    return [stems.give(entry) for entry in wanted]


@pytest.mark.parametrize(
    ("first", "second"),
    [("A", "a"), ("stra\u00dfe", "STRASSE"), ("caf\u00e9", "cafe\u0301"), ("\u0130", "i\u0307"), ("\u212b", "\u00e5")],
)
def test_names_that_some_disk_takes_for_one_get_two_stems(first, second):
    assert collision_key(first) == collision_key(second)
    wanted = [Wanted("1", first, (".jpg", ".txt")), Wanted("2", second, (".jpg", ".txt"))]
    stems = assign_stems(wanted, max_bytes=255)
    assert stems[0] == first and collision_key(stems[0]) != collision_key(stems[1])


def test_long_names_have_room_for_the_mark():
    long = "ä" * 125 + "x"  # 251 bytes
    wanted = [Wanted(str(i), long, (".jpg", ".txt")) for i in range(50)]
    stems = assign_stems(wanted, max_bytes=255)
    assert stems[0] == long and len(set(stems)) == 50
    assert max(len(os.fsencode(stem + ".jpg")) for stem in stems) <= 255
    assert assign_stems([Wanted("1", long, (".jpg", ".json"))], max_bytes=255) != [long]  # the label would not fit


def test_a_name_that_looks_like_a_mark_is_no_collision():
    first = assign_stems([Wanted("1", "a", (".jpg",)), Wanted("2", "a", (".jpg",))], max_bytes=255)
    wanted = [Wanted("1", "a", (".jpg",)), Wanted("3", first[1], (".jpg",)), Wanted("2", "a", (".jpg",))]
    assert len(set(assign_stems(wanted, max_bytes=255))) == 3


def test_strange_names_travel_and_come_back(tmp_path):
    source = tmp_path / "in"
    names = [b"new\nline", b"not utf-8 \xff\xfe", b"<script>alert(1)</script>"[:20].replace(b"/", b""), b"x" * 251]
    names += ["ä".encode() * 125, b"'quote\" $(rm) \\", b" ", b"-rf"]
    for folder in (b"1", b"2"):
        for name in names:
            write_file(source / os.fsdecode(folder) / "img" / os.fsdecode(name + b".jpg"), folder + name)
            write_file(source / os.fsdecode(folder) / "lab" / os.fsdecode(name + b".txt"), name + folder)
    before = tree(source)
    plan = plan_of(source, tmp_path / "out", mode="move")
    organize(plan)
    assert plan.count("label") == 2 * len(names) and plan.n_renamed == len(names)
    assert tree(source) == {}
    assert sorted(value[0] for value in tree(tmp_path / "out").values()) == sorted(v[0] for v in before.values())
    for line in (tmp_path / "out/plan.jsonl").read_bytes().splitlines():
        json.loads(line)  # ASCII all through: a newline in a name does not break a line
    undo(tmp_path / "out")
    assert tree(source) == before


# --- Checks before anything is touched -------------------------------------------------------------------------------


def test_existing_targets_are_refused_and_nothing_is_touched(small, tmp_path):
    before = tree(small)
    write_file(tmp_path / "out/cluster_000/img/0001.jpg", b"somebody's")
    with pytest.raises(UserError, match=r"none was touched.*\n.*exist already"):
        organize(plan_of(small, tmp_path / "out", mode="move"))
    assert tree(small) == before
    assert tree(tmp_path / "out").keys() == {"cluster_000/img/0001.jpg"} and find_stage(tmp_path / "out") == "none"


@pytest.mark.parametrize(("source", "target"), [("in", "in/out"), ("in/deep", "in"), ("in", "in")])
def test_folders_inside_each_other_are_refused(tmp_path, source, target):
    write_file(tmp_path / source / "x.jpg", b"x")
    with pytest.raises(UserError, match="lie in each other"):
        plan_of(tmp_path / source, tmp_path / target)


def test_a_link_to_the_input_is_seen_through(tmp_path):
    write_file(tmp_path / "in/x.jpg", b"x")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(UserError, match="lie in each other"):
        plan_of(tmp_path / "in", tmp_path / "link" / "out")


def test_too_little_space_is_told_before_the_first_file(small, tmp_path):
    plan = plan_of(small, tmp_path / "out")
    draft = ActionDraft(tmp_path)
    for action in plan.actions:
        draft.add(replace(action, n_bytes=2**60))
    with pytest.raises(UserError, match="bytes are needed at"):
        check_plan(replace(plan, actions=draft.finish()))


def test_hardlinks_across_file_systems_are_refused(small, other_disk):
    with pytest.raises(UserError, match="no hard link reaches"):
        organize(plan_of(small, other_disk / "out", mode="hardlink"))


def test_moving_out_of_a_read_only_folder_is_refused(small, tmp_path):
    """In a process without the rights of the administrator, whom no mode of a folder stops."""
    for folder, _, _ in os.walk(small):
        os.chmod(folder, 0o555)
    code = run_forked(lambda: organize(plan_of(small, tmp_path / "out", mode="move")), user=65534, world=tmp_path)
    assert "cannot be written to, so that no file can be moved" in code.message
    assert len(tree(small)) == 6
    assert not run_forked(lambda: organize(plan_of(small, tmp_path / "out")), user=65534, world=tmp_path).message


# --- Changes between plan and action, full disks, other runs ---------------------------------------------------------


def test_a_source_that_changed_stays_with_its_label(small, tmp_path):
    plan = plan_of(small, tmp_path / "out", mode="move")
    write_file(small / "a/img/0001.jpg", b"edited meanwhile")
    (small / "b/img/0002.png").unlink()
    report = organize(plan)
    reasons = dict(report.skipped)
    assert "changed since it was planned" in reasons[str(small / "a/img/0001.jpg")]
    assert "changed since it was planned" in reasons[str(small / "a/lab/0001.txt")]
    assert "is gone" in reasons[str(small / "b/img/0002.png")]
    assert (small / "a/img/0001.jpg").read_bytes() == b"edited meanwhile" and (small / "a/lab/0001.txt").exists()
    assert (report.stage, report.n_changed) == ("finished", 3)


def test_an_image_that_changed_since_the_scan_is_left_out_of_the_plan(small, tmp_path):
    clustered = clustered_images(small, {})
    write_file(small / "a/img/0001.jpg", b"edited meanwhile")
    plan = plan_files(
        clustered, input_dir=small, output_dir=tmp_path / "out", mode="move", annotations=AnnotationSettings()
    )
    assert plan.left_out == ((str(small / "a/img/0001.jpg"), "changed since it was scanned"),)
    assert plan.count("image") == 2 and plan.labels.orphan == 0


def test_a_touched_but_equal_source_is_taken(small, tmp_path):
    plan = plan_of(small, tmp_path / "out", mode="move")
    os.utime(small / "a/img/0001.jpg")
    assert organize(plan).skipped == ()


def test_a_target_that_appears_after_the_check_is_not_overwritten(small, tmp_path, monkeypatch):
    plan = plan_of(small, tmp_path / "out", mode="move")
    rename = moves.rename_exclusive

    def appears_just_before(source, target):
        if str(target).endswith("0002.png") and not Path(target).exists():
            write_file(Path(target), b"somebody's")
        rename(source, target)

    monkeypatch.setattr(moves, "rename_exclusive", appears_just_before)
    with pytest.raises(UserError, match="appeared since the plan"):
        organize(plan)
    monkeypatch.undo()
    foreign = tmp_path / "out/cluster_000/img/0002.png"
    assert foreign.read_bytes() == b"somebody's" and (small / "b/img/0002.png").read_bytes() == b"no label here"
    before = tree(small)
    foreign.unlink()
    assert resume(tmp_path / "out").stage == "finished"
    undo(tmp_path / "out")
    assert before.items() <= tree(small).items() and len(tree(small)) == 6


def test_a_full_disk_leaves_all_files_whole(tmp_path):
    with small_disk(tmp_path / "disk", megabytes=1) as mounted:
        if not mounted:
            pytest.skip("no small disk can be mounted here")
        out, filler = tmp_path / "disk" / "out", tmp_path / "disk" / "filler"
        for i in range(6):
            write_file(tmp_path / "in" / f"{i}.jpg", os.urandom(100_000))
        before = tree(tmp_path / "in")
        plan = plan_of(tmp_path / "in", out, mode="move")
        check_plan(plan)
        out.mkdir()
        write_plan(plan, folder=out)
        filler.write_bytes(b"x" * 700_000)  # somebody else fills the disk after the check
        with pytest.raises(UserError, match="full"):
            resume(out)
        assert {**{Path(name).name: state for name, state in tree(out).items()}, **tree(tmp_path / "in")} == before
        filler.unlink()
        assert resume(out).stage == "finished" and tree(tmp_path / "in") == {}
        undo(out)
        assert tree(tmp_path / "in") == before


def test_the_same_plan_again_does_nothing(small, tmp_path):
    out = tmp_path / "out"
    organize(plan_of(small, out))
    before, journal = tree(out), (out / "journal.jsonl").read_bytes()
    report = organize(plan_of(small, out))
    assert (report.stage, report.n_changed) == ("finished", 0)
    assert tree(out) == before and (out / "journal.jsonl").read_bytes() == journal
    assert resume(out).n_changed == 0


def test_another_plan_in_the_same_folder_is_refused_until_undone(small, tmp_path):
    out = tmp_path / "out"
    organize(plan_of(small, out))
    other = plan_of(small, out, labels={"b/img/0002.png": 1})
    with pytest.raises(UserError, match="another plan"):
        organize(other)
    undo(out)
    assert organize(other).n_changed == 6
    undo(out)
    assert organize(other).n_changed == 6  # the same plan once more after its undo
    assert find_stage(out) == "finished"


def test_a_plan_that_was_edited_is_not_taken_for_the_one_that_ran(small, tmp_path):
    out = tmp_path / "out"
    organize(plan_of(small, out, mode="move"))
    text = (out / "plan.jsonl").read_text()
    (out / "plan.jsonl").write_text(text.replace("0002.png", "0003.png"))
    with pytest.raises(UserError, match="another plan"):
        undo(out)
    (out / "plan.jsonl").write_text(text[:-20])
    with pytest.raises(UserError, match="damaged"):
        undo(out)
    (out / "plan.jsonl").write_text(text)
    undo(out)
    assert len(tree(small)) == 6


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        '{"plan": "x", "event": "guess"}',
        '{"plan": "x", "event": "done", "action": 99}',
        '{"plan": "x", "event": null, "action": 0}',
    ],
)
def test_a_damaged_journal_is_told_and_nothing_touched(small, tmp_path, line):
    out = tmp_path / "out"
    organize(plan_of(small, out, mode="move"))
    before, journal = tree(out), (out / "journal.jsonl").read_bytes()
    (out / "journal.jsonl").write_bytes(journal.replace(b"\n", b"\n" + line.encode() + b"\n", 1))
    with pytest.raises(UserError, match="line 2 is damaged"):
        undo(out)
    assert tree(out) == before
    (out / "journal.jsonl").write_bytes(journal)
    undo(out)
    assert len(tree(small)) == 6


def test_two_runs_at_once_are_refused(small, tmp_path):
    plan = plan_of(small, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with Journal(tmp_path / "out", plan_digest=plan.digest), pytest.raises(LockHeld):
        organize(plan)


def test_nothing_to_resume_or_undo_is_said(tmp_path):
    for action in (resume, undo):
        with pytest.raises(UserError, match=r"plan\.jsonl does not exist"):
            action(tmp_path)


# --- Undo never loses anything ---------------------------------------------------------------------------------------


def test_undo_moves_edited_files_back_as_they_are(small, tmp_path):
    organize(plan_of(small, tmp_path / "out", mode="move"))
    write_file(tmp_path / "out/cluster_000/lab/0001.txt", b"edited in its cluster")
    undo(tmp_path / "out")
    assert (small / "a/lab/0001.txt").read_bytes() == b"edited in its cluster"


def test_undo_keeps_copies_that_were_edited_or_are_the_last(small, tmp_path):
    out = tmp_path / "out"
    organize(plan_of(small, out))
    write_file(out / "cluster_000/lab/0001.txt", b"edited in its cluster")
    (small / "b/img/0002.png").unlink()
    report = undo(out)
    assert report.stage == "undoing" and {Path(path).name for path, _ in report.skipped} == {"0001.txt", "0002.png"}
    assert (out / "cluster_000/lab/0001.txt").read_bytes() == b"edited in its cluster"
    assert (out / "cluster_000/img/0002.png").read_bytes() == b"no label here"
    (out / "cluster_000/lab/0001.txt").unlink()
    shutil.move(out / "cluster_000/img/0002.png", small / "b/img/0002.png")
    assert undo(out).stage == "undone" and tree(out) == {}


def test_undo_does_not_overwrite_a_new_file_at_the_old_place(small, tmp_path):
    out = tmp_path / "out"
    organize(plan_of(small, out, mode="move"))
    write_file(small / "b/img/0002.png", b"a new image of that name")
    report = undo(out)
    assert "is taken by another file" in report.skipped[0][1] and report.stage == "undoing"
    assert (small / "b/img/0002.png").read_bytes() == b"a new image of that name"
    assert (out / "cluster_000/img/0002.png").read_bytes() == b"no label here"


def test_undo_makes_removed_folders_again_and_keeps_foreign_files(small, tmp_path):
    before = tree(small)
    out = tmp_path / "out"
    organize(plan_of(small, out, mode="move"))
    shutil.rmtree(small / "a")
    write_file(out / "cluster_000/notes.md", b"mine")
    undo(out)
    assert tree(small) == before and tree(out).keys() == {"cluster_000/notes.md"}


# --- File systems without renameat2 ----------------------------------------------------------------------------------


def test_links_stand_in_where_rename_without_overwrite_is_missing(small, tmp_path, monkeypatch):
    monkeypatch.setattr(moves, "_load_from_libc", lambda name: None)
    before = tree(small)
    organize(plan_of(small, tmp_path / "out", mode="move"))
    with pytest.raises(FileExistsError):
        moves.rename_exclusive(tmp_path / "out/cluster_000/img/0001.jpg", tmp_path / "out/cluster_000/img/0002.png")
    undo(tmp_path / "out")
    assert tree(small) == before


# --- Killed anywhere -------------------------------------------------------------------------------------------------

KILLED_EVENTS = {"os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.utime"}


class Forked:
    """How a forked process ended."""

    def __init__(self, status, message, n_points=0):
        self.killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        self.message = message
        self.n_points = n_points


def run_forked(work, *, kill_at=None, user=None, world=None):
    """Run `work` in a child that kills itself before its n-th touch of the disk; returns how it ended.

    A touch is a file opened for writing, written, flushed, linked, renamed, removed, made or changed in its times; a
    write is cut in half. Without `kill_at` the touches are counted.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        _, status = os.waitpid(pid, 0)
        n_points, _, message = text.partition("\n")
        return Forked(status, message, int(n_points or 0))
    message, points = "", [0]
    try:
        os.close(reader)
        if user is not None and os.geteuid() == 0:
            for path in (world, *world.parents):
                if path.stat().st_uid == 0 and path != Path("/"):
                    with contextlib.suppress(OSError):
                        path.chmod(path.stat().st_mode | 0o011)
            world.chmod(0o777)
            os.setgid(user)
            os.setuid(user)
        watch_disk(points, kill_at)
        work()
    except UserError as problem:
        message = str(problem)
    except BaseException:
        message = traceback.format_exc()
    os.write(writer, f"{points[0]}\n{message}".encode())
    os._exit(0)


def watch_disk(points, kill_at):
    """Count the touches of the disk of this process from now on, and die at one of them."""
    write, fsync, load = os.write, os.fsync, moves._load_from_libc

    lock = threading.Lock()

    def touch():
        with lock:
            points[0] += 1
            if points[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return points[0] + 1 == kill_at

    def on_event(event, arguments):
        opened_for_writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
        if event in KILLED_EVENTS or opened_for_writing:
            touch()

    def torn_write(descriptor, content):
        if touch():
            write(descriptor, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, content)

    def watched_fsync(descriptor):
        touch()
        fsync(descriptor)

    def watched_load(name):
        def watched(*arguments):
            touch()
            return load(name)(*arguments)

        return watched

    sys.addaudithook(on_event)
    os.write, os.fsync = torn_write, watched_fsync
    moves._load_from_libc = watched_load


LIGHT_PROCESS = """
import sys
sys.path[:] = sys.argv[2:]
import cloudpickle
work = cloudpickle.load(sys.stdin.buffer)
with open(sys.argv[1], "wb") as answer:
    cloudpickle.dump(work(), answer)
"""


def in_light_process(work):
    """What `work` returns, from a process of its own: a fork of the one that runs all tests copies what they loaded."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        command = [sys.executable, "-c", LIGHT_PROCESS, answer, *sys.path]
        ended = subprocess.run(command, input=cloudpickle.dumps(work), capture_output=True)
        assert ended.returncode == 0, ended.stderr.decode()
        return pickle.loads(answer.read_bytes())


def sweep_kills(build, begin, finish, check, *, patched=contextlib.nullcontext):
    """Kill `begin` at every touch of the disk in a fresh world, `finish` it, and `check`; returns their number."""

    def work():
        with patched():
            return kill_at_every_touch(build, begin, finish, check)

    return in_light_process(work)


def kill_at_every_touch(build, begin, finish, check):
    """The sweep itself."""
    world = build()
    whole = run_forked(lambda: begin(world))
    assert not whole.message, whole.message
    failures = []
    for point in range(1, whole.n_points + 1):
        world = build()
        assert run_forked(lambda world=world: begin(world), kill_at=point).killed
        ended = run_forked(lambda world=world: finish(world))
        problem = ended.message or check(world)
        if problem:
            failures.append((point, problem))
    assert not failures, f"{len(failures)} of {whole.n_points} points, first: {failures[0]}"
    return whole.n_points


class World:
    """A small input on one file system and an output on the same or another one."""

    def __init__(self, folder, other=None, *, mode="move"):
        self.source = Path(tempfile.mkdtemp(dir=folder))
        self.out = Path(tempfile.mkdtemp(dir=other or folder)) / "out"
        for name, content in (("img/a.jpg", b"a" * 9000), ("img/b.jpg", b"b" * 10), ("lab/a.txt", b"0 1 1 1 1\n")):
            write_file(self.source / name, content)
        self.before = tree(self.source)
        self.plan = plan_of(self.source, self.out, mode=mode, labels={"img/b.jpg": -1})
        self.mode = mode

    def organize(self):
        organize(self.plan)

    def finish_forward(self):
        """What a user does after a kill: resume, or start again where the kill came before the plan was written."""
        resume(self.out) if (self.out / "plan.jsonl").exists() else organize(self.plan)

    def undo(self):
        if (self.out / "plan.jsonl").exists():
            undo(self.out)

    def is_organized(self):
        after, kept = tree(self.out), tree(self.source)
        expected = {
            "cluster_000/img/a.jpg": "img/a.jpg",
            "cluster_000/lab/a.txt": "lab/a.txt",
            "noise/img/b.jpg": "img/b.jpg",
        }
        if after != {target: self.before[source] for target, source in expected.items()}:
            return f"output holds {sorted(after)}"
        return "" if kept == ({} if self.mode == "move" else self.before) else f"input holds {sorted(kept)}"

    def is_restored(self):
        if tree(self.source) != self.before:
            return f"input holds {sorted(tree(self.source))}"
        left = [str(path) for path in self.out.rglob("*") if not path.name.endswith((".jsonl", ".tmp"))]
        return f"output holds {left}" if left else ""


@pytest.fixture
def crash_folders():
    """A folder in memory where there is such a file system, so that flushing costs nothing."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shm if shm.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def small_disk(folder, *, megabytes):
    """Mount a file system of its own, in memory; yields False where that is not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


@pytest.fixture
def second_disk(tmp_path, crash_folders):
    """A file system other than that of crash_folders, in memory too where that is permitted."""
    folder = tmp_path / "disk"
    with small_disk(folder, megabytes=64):
        if folder.stat().st_dev == crash_folders.stat().st_dev:
            pytest.skip("there is no second file system here")
        yield folder


@pytest.mark.parametrize("mode", ["move", "copy"])
def test_killed_anywhere_resume_finishes(crash_folders, mode):
    n_points = sweep_kills(
        lambda: World(crash_folders, mode=mode), World.organize, World.finish_forward, World.is_organized
    )
    assert n_points > 30


@pytest.mark.parametrize("mode", ["move", "copy"])
def test_killed_anywhere_undo_restores(crash_folders, mode):
    sweep_kills(lambda: World(crash_folders, mode=mode), World.organize, World.undo, World.is_restored)


def test_killed_anywhere_across_file_systems_resume_finishes(crash_folders, second_disk):
    n_points = sweep_kills(
        lambda: World(crash_folders, second_disk), World.organize, World.finish_forward, World.is_organized
    )
    assert n_points > 50


def test_killed_anywhere_across_file_systems_undo_restores(crash_folders, second_disk):
    sweep_kills(lambda: World(crash_folders, second_disk), World.organize, World.undo, World.is_restored)


def organized(world):
    organize(world.plan)
    return world


@pytest.mark.parametrize("mode", ["move", "copy"])
def test_killed_in_the_middle_of_an_undo_undo_finishes(crash_folders, second_disk, mode):
    other = second_disk if mode == "move" else None
    sweep_kills(lambda: organized(World(crash_folders, other, mode=mode)), World.undo, World.undo, World.is_restored)


def careless_rename(source, target):
    """Removes the source before its copy is whole, as `read, unlink, write` does."""
    content = Path(source).read_bytes()
    Path(source).unlink()
    Path(target).write_bytes(content)


def test_a_bad_mover_is_caught(crash_folders):
    """The negative control."""
    with pytest.raises(AssertionError, match="points, first"):
        sweep_kills(
            lambda: World(crash_folders), World.organize, World.undo, World.is_restored,
            patched=lambda: mock.patch.object(moves, "rename_exclusive", careless_rename),
        )  # fmt: skip


# --- Real data -------------------------------------------------------------------------------------------------------


def read_yolo(folder):
    """An independent reader: image stem -> (image bytes hash, boxes), by walking img/ folders and their lab/ twins."""
    data = {}
    for image in folder.glob("**/img/*.jpg"):
        label = image.parent.parent / "lab" / f"{image.stem}.txt"
        boxes = []
        for line in label.read_text().split("\n") if label.exists() else []:
            if line.strip():
                number, *box = line.split()
                boxes.append((int(number), tuple(float(value) for value in box)))
        data[image.stem] = (hashlib.md5(image.read_bytes()).hexdigest(), boxes)
    return data


@pytest.fixture(scope="module")
def bccd(tmp_path_factory):
    if not (DATA_DIR / "bccd").is_dir():
        pytest.skip("the data folder has no bccd")
    source = tmp_path_factory.mktemp("bccd") / "in"
    shutil.copytree(DATA_DIR / "bccd", source)
    for path in source.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return source


@pytest.mark.parametrize("mode", ["copy", "move", "hardlink"])
def test_real_microscope_images_keep_their_boxes(bccd, tmp_path_factory, mode):
    out = tmp_path_factory.mktemp("sorted") / "out"
    before, boxes = tree(bccd), read_yolo(bccd)
    names = sorted(path.name for path in (bccd / "img").iterdir())
    plan = plan_of(bccd, out, mode=mode, labels={f"img/{name}": i % 5 - 1 for i, name in enumerate(names)})
    report = organize(plan)
    assert (report.n_images, report.n_labels, report.labels["found"], report.n_changed) == (364, 364, 364, 729)
    assert read_yolo(out) == boxes and sum(len(found) for _, found in boxes.values()) > 4000
    assert (out / "classes.txt").read_text().split() == ["RBC", "WBC", "Platelets"]
    assert len(tree(bccd)) == (1 if mode == "move" else len(before))
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        "cluster_000",
        "cluster_001",
        "cluster_002",
        "cluster_003",
        "noise",
    ]
    assert undo(out).n_changed == 729 and tree(bccd) == before and tree(out) == {}


def test_the_plan_of_real_images_is_the_same_twice_and_survives_reading(bccd, tmp_path):
    plan = plan_of(bccd, tmp_path / "out", mode="move")
    assert plan.digest == plan_of(bccd, tmp_path / "out", mode="move").digest
    write_plan(plan, folder=tmp_path)
    assert read_plan(tmp_path) == plan
    assert hashlib.sha256((tmp_path / "plan.jsonl").read_bytes()).hexdigest() == plan.digest


def test_what_the_system_refuses_is_said_with_the_way_on(small, tmp_path, monkeypatch):
    plan = plan_of(small, tmp_path / "out", mode="move")
    rename = moves.rename_exclusive

    def broken_disk(source, target):
        if str(target).endswith("0002.png"):
            raise OSError(errno.EIO, "Input/output error", str(target))
        rename(source, target)

    monkeypatch.setattr(moves, "rename_exclusive", broken_disk)
    with pytest.raises(UserError, match=r"0002\.png: Input/output error; mend that and go on with --resume"):
        organize(plan)
    monkeypatch.undo()
    assert resume(tmp_path / "out").stage == "finished"

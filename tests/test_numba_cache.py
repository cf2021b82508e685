"""What numba compiles finds a place where neither the code nor HOME can be written to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import common.numba_cache as numba_cache

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def locked(tmp_path):
    """A copy of the code, and the environment of a process that can write neither to it nor to HOME, root included."""
    shutil.copytree(ROOT / "common", tmp_path / "code" / "common", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "code" / "common" / "__pycache__").write_bytes(b"")  # a file where a folder would be
    (tmp_path / "temporary").mkdir()
    home = tmp_path / "code" / "common" / "__pycache__" / "home"
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(tmp_path / "temporary")}
    return tmp_path / "code", environment


def load(code: Path, environment: dict[str, str], first: str) -> subprocess.CompletedProcess[str]:
    program = f"import logging; logging.basicConfig(level='INFO'); {first}; import common.best_scores"
    return subprocess.run(
        [sys.executable, "-c", program], cwd=code, env=environment, capture_output=True, text=True, check=False
    )


def test_a_private_folder_is_used_where_nothing_else_can_be_written(locked):
    code, environment = locked
    done = load(code, environment, "from common.numba_cache import ensure_cache_folder as e; e(); e()")
    assert done.returncode == 0, done.stderr
    (folder,) = Path(environment["TMPDIR"]).iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert done.stderr.count(f"what numba compiles is kept in {folder}") == 1
    assert "no locator available" in load(code, environment, "pass").stderr  # without it


def test_a_folder_that_others_could_have_filled_is_not_used(tmp_path):
    own = numba_cache._private_folder(tmp_path)
    assert numba_cache._private_folder(tmp_path) == own  # kept between runs
    own.chmod(0o770)
    assert numba_cache._private_folder(tmp_path) != own
    own.rmdir()
    own.symlink_to(tmp_path)
    assert not numba_cache._private_folder(tmp_path).samefile(tmp_path)


def test_what_is_set_and_what_is_found_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "somewhere")
    numba_cache.ensure_cache_folder()
    assert os.environ["NUMBA_CACHE_DIR"] == "somewhere"
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setattr(numba_cache, "_code_folders", lambda: iter([tmp_path / "gone"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    numba_cache.ensure_cache_folder()
    assert "NUMBA_CACHE_DIR" not in os.environ


def test_a_user_whose_home_nobody_knows_gets_no_folder_called_tilde(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert not numba_cache._can_write(Path("~/.cache/numba"))
    assert not list(tmp_path.iterdir())

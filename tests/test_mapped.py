"""Mapped matrices: their memory can be given back, and nothing that was written to them is ever lost."""

from __future__ import annotations

import errno
import mmap
import os
import re
from pathlib import Path

import numpy as np
import pytest

from common import mapped
from common.mapped import mapped_matrix, put_rows, release, take_rows

SHAPE = (20_000, 400)  # 32 MB
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux what is resident")


def file_mib() -> float:
    """Resident memory of this process that files back."""
    return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@linux
def test_memory_is_given_back_and_values_stay(tmp_path):
    before = file_mib()
    matrix = mapped_matrix(SHAPE, folder=tmp_path / "new")
    assert matrix.dtype == np.float32 and not matrix.any() and list((tmp_path / "new").iterdir()) == []
    matrix[:] = np.arange(SHAPE[0])[:, None]
    assert file_mib() - before > 28
    part = np.ascontiguousarray(matrix[3:19_001], np.float32)  # a view of the same rows, as our steps make them
    release(part)
    assert file_mib() - before < 4
    assert (matrix == np.arange(SHAPE[0])[:, None]).all() and matrix[-1, 0] == 19_999
    matrix[7] = -1
    release(matrix)
    assert (part[4] == -1).all()


def test_what_others_map_is_left_alone(tmp_path):
    """Pages of a private mapping would come back from the file, without what was written to them."""
    np.save(tmp_path / "a.npy", np.zeros((1000, 100), np.float32))
    private = np.load(tmp_path / "a.npy", mmap_mode="c")
    anonymous = np.frombuffer(mmap.mmap(-1, 400_000), np.float32)
    for array in (private, anonymous, np.zeros((1000, 100), np.float32), np.zeros((0, 4), np.float32)):
        array[:] = 5
        release(array)
        assert (array == 5).all()


def test_a_full_disk_is_met_before_anything_is_written(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with caplog.at_level("INFO"):
        matrix = mapped_matrix(SHAPE, folder=tmp_path)
    assert "kept in memory" in caplog.text and "No space left" in caplog.text
    matrix[:] = 1
    release(matrix)
    assert matrix.all() and list(tmp_path.iterdir()) == []


@linux
@pytest.mark.parametrize("is_mapped", [True, False])
def test_rows_from_anywhere_are_taken_and_put_and_little_of_the_matrix_stays(tmp_path, monkeypatch, is_mapped):
    monkeypatch.setattr(mapped, "_NEARBY_BYTES", 1 << 20)
    matrix = mapped_matrix(SHAPE, folder=tmp_path) if is_mapped else np.zeros(SHAPE, np.float32)
    numbers = np.random.default_rng(0).permutation(SHAPE[0])[:7_000]
    before = file_mib()
    put_rows(matrix, numbers, np.repeat(numbers[:, None] + 1, SHAPE[1], axis=1))
    assert not is_mapped or file_mib() - before < 4
    expected = np.zeros(SHAPE[0])
    expected[numbers] = numbers + 1
    assert (matrix == expected[:, None]).all()
    release(matrix)
    asked = np.concatenate([numbers[:3000][::-1], [0, SHAPE[0] - 1, 0]])
    assert np.array_equal(take_rows(matrix, asked)[:, 5], expected[asked])
    assert not is_mapped or file_mib() - before < 4
    assert take_rows(matrix, asked[:0]).shape == (0, SHAPE[1])

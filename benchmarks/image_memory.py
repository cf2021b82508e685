"""What a whole run of image_cluster.py holds in memory, step by step, and how much of it each row adds.

The run is the real one, from the scan to the sorted files; only the features come from the cache, where a network would
have put them. A step ends where the program logs that it is done: there the peak since the last such line is read, and
the system is told to measure anew.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Cost, Work
from benchmarks.outcomes import Finding

N_DIMENSIONS = 384
# Clusters that touch, as those of photographs do: the graph of their neighbours is one piece, which takes most memory.
NOISE = 1.2
_FEATURE_BYTES = 4 * N_DIMENSIONS
# Lines of the log that end a step, by how they begin.
_STEPS = ("scan", "features", "reduction", "clustering", "purity", "pictures", "exports", "files")


def write_input(folder: Path, make_vectors: Callable[[], np.ndarray]) -> None:
    """Write a tiny image with a label file for each of the vectors [n, d], and the vectors into the cache.

    What an earlier start has written whole is used again.
    """
    import cv2

    from image_parts.cache import FeatureCache
    from image_parts.extractors import identify_model
    from image_parts.features import cache_key

    if (folder / "whole").exists():
        return
    settings, vectors = _settings(folder), make_vectors()
    cache = FeatureCache(folder / "cache", cache_key(settings, identify_model(settings.model)))
    pixels = np.zeros((8, 8), np.uint8)
    with cache.writer(vectors.shape[1]) as writer:
        for row, vector in enumerate(vectors):
            pixels.reshape(-1)[:8] = np.frombuffer(np.int64(row).tobytes(), np.uint8)
            content = cv2.imencode(".png", pixels)[1].tobytes()
            place = folder / "in" / f"{row // 1000:04d}"
            for name, text in (
                (f"img/{row % 1000:03d}.png", content),
                (f"lab/{row % 1000:03d}.txt", b"0 .5 .5 .1 .1\n"),
            ):
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(text)
            writer.add(hashlib.sha256(content).hexdigest(), vector)
    (folder / "whole").touch()


def whole_run(*, folder: str) -> Work:
    """The command itself, libraries loaded before."""
    _load_libraries()
    from image_cluster import run

    settings = _settings(Path(folder))
    shutil.rmtree(settings.output_dir, ignore_errors=True)

    def work() -> dict[str, Any]:
        steps = _StepPeaks()
        for name in ("image_parts", "image_cluster"):
            logging.getLogger(name).setLevel("INFO")
            logging.getLogger(name).addHandler(steps)
        found = run(settings, yes=True)
        return {"steps": steps.peaks, "peak_mib": max(steps.peaks.values()), "n_clusters": found["n_clusters"]}

    return work


def memory_findings(costs: dict[int, Cost]) -> list[Finding]:
    """Peaks of the whole run and of each step, and their growth, from runs by their number of images, few first."""
    few, *_, many = costs
    added_rows = many - few

    def growth(few_mib: float, many_mib: float) -> int:
        return round((many_mib - few_mib) * 2**20 / added_rows)

    steps = {step: growth(*(costs[n].result["steps"][step] for n in (few, many))) for step in _STEPS}
    matrix_mib = {n: n * _FEATURE_BYTES / 2**20 for n in costs}
    whole = growth(costs[few].peak_mib, costs[many].peak_mib)
    return [
        Finding.flat(f"peak of the whole run, {few:,} to {many:,} images", costs[few].peak_mib, costs[many].peak_mib),
        Finding.fact("bytes an image that it grows by", whole),
        *(Finding.fact(f"MiB at {n:,} images, the mapped matrix counted as if it were whole in memory",
                       round(cost.peak_mib + matrix_mib[n])) for n, cost in costs.items()),
        Finding.at_most("bytes an image that the peak of a step grows by, the largest", max(steps.values()),
                        _FEATURE_BYTES),
        Finding.fact("the same as a share of the matrix's row", max(steps.values()) / _FEATURE_BYTES),
        *(Finding(f"{step}: bytes an image (MiB at the peak)", f"{added} ({_peaks(costs, step)})", "", "")
          for step, added in steps.items()),
    ]  # fmt: skip


def _peaks(costs: dict[int, Cost], step: str) -> str:
    return ", ".join(f"{cost.result['steps'][step]:.0f}" for cost in costs.values())


class _StepPeaks(logging.Handler):
    """Notes the peak of resident memory at the end of each step, in MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, float] = {}
        _measure_anew()

    def emit(self, record: logging.LogRecord) -> None:
        step = record.getMessage().partition(":")[0]
        if step in _STEPS:
            self.peaks[step] = max(_peak_mib(), self.peaks.get(step, 0.0))
            _measure_anew()


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _measure_anew() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM


def _settings(folder: Path) -> Any:
    from image_parts.settings import ImageSettings

    values = {
        "input_dir": str(folder / "in"),
        "output_dir": str(folder / "out"),
        "mode": "hardlink",
        "model": {"name": "hog"},
        "cache": {"cache_dir": str(folder / "cache")},
        "progress": False,
    }
    return ImageSettings.model_validate(values)


def _load_libraries() -> None:
    import cv2  # noqa: F401
    import hdbscan  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import plotly  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import umap  # noqa: F401

    import common.best_scores
    import common.distance_sums  # noqa: F401

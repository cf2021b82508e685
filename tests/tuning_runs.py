"""A tiny tuning: three handwritten digits as images, and a space of few embeddings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from common import cli
from common.commit import Identity
from image_parts.settings import ImageSettings

if TYPE_CHECKING:
    from image_parts.tuning.tuner import SearchResult

Settings = ImageSettings  # stage_server.py runs this module like a script

ROOT = Path(__file__).resolve().parent.parent
SPACE = {
    "reduction.umap_n_neighbors": [5, 8],
    "reduction.umap_components": [2, 3],
    "clustering.min_cluster_size": [4, 8, 12, 16],
    "clustering.min_samples": [2, 6],
    "clustering.cluster_selection_method": ["leaf", "eom"],
}


def run(settings: ImageSettings, *, overwrite: bool = False, iteration: int | None = None) -> Path:
    """The search of a run, its table, configs and summary; without pictures and page, which take most of a tiny run."""
    import iterative_tuning
    from image_parts.tuning.outputs import summarize, write_configs, write_summary
    from image_parts.tuning.space import read_space

    output = Path(settings.output_dir)
    iterative_tuning.begin(output, Identity("test", {}, {}), settings, overwrite=overwrite)
    found = search(settings)
    write_configs(found.ranking, read_space(settings), output_dir=output)
    space = read_space(settings)
    write_summary(summarize(found, {}, space, identity={}, importances={}, truth=None), output_dir=output)
    return output


def search(settings: ImageSettings) -> SearchResult:
    """The search of a run and its table."""
    import iterative_tuning
    from common.backend import CPU
    from image_parts.tuning.outputs import write_results
    from image_parts.tuning.records import Records
    from image_parts.tuning.tuner import search_candidates

    output = Path(settings.output_dir)
    found = search_candidates(
        iterative_tuning.read_tunable_space(settings),
        iterative_tuning.scan(settings, Path(settings.input_dir)),
        Records(output / "_tuning"),
        backend=CPU,
        stage_root=iterative_tuning.stage_root(settings, output),
        tell=lambda evaluation, was_there: None,
    )
    write_results(found, output_dir=output)
    return found


def check(settings: ImageSettings) -> dict[str, Any]:
    """What the command line asks of a script."""
    return {}


def write_digits(folder: Path, *, n_each: int = 30) -> Path:
    """The digits 0, 1 and 2, `n_each` of each, in a folder for each."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for digit in range(3):
        (folder / str(digit)).mkdir(parents=True)
        for number, pixels in enumerate(digits.images[digits.target == digit][:n_each]):
            Image.fromarray((pixels * 15).astype("uint8")).save(folder / str(digit) / f"{number:03d}.png")
    return folder


def tuning_values(images: Path, output: Path, cache: Path, **tuning: Any) -> dict[str, Any]:
    """Settings of a quick run; `tuning` changes its section."""
    return {
        "input_dir": str(images),
        "output_dir": str(output),
        "progress": False,
        "model": {"name": "hog", "image_size": 32, "hog_cells": 3, "num_workers": 1},
        "preprocessing": {"equalization": "none", "polarity_invariant": False},
        "cache": {"cache_dir": str(cache)},
        "reduction": {"pca_components": 10, "umap_min_dist": 0.0},
        "clustering": {"min_cluster_size": 8, "min_samples": 2},
        "acceleration": {"backend": "cpu"},
        "visualization": {"max_points": 50, "clahe_comparison_samples": 2},
        "tuning": {
            "search_strategy": "grid",
            "search_space": SPACE,
            "stability_top_n": 1,
            "stability_seeds": 1,
            "generate_full_visuals_for_top_n": 0,
            **tuning,
        },
    }


def tuning_settings(images: Path, output: Path, cache: Path, **tuning: Any) -> ImageSettings:
    return ImageSettings.model_validate(tuning_values(images, output, cache, **tuning))


def main(*arguments: str) -> int:
    """iterative_tuning.py in this process."""
    import iterative_tuning

    return cli.main(
        ImageSettings,
        iterative_tuning.run,
        doc="",
        section=None,
        check=iterative_tuning.check,
        add_arguments=iterative_tuning.add_arguments,
        argv=arguments,
    )


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def read_results(output: Path) -> dict[str, bytes]:
    """Everything that a run left, but seconds, journal and lock: what an interrupted run must reach too."""
    found = {}
    for path in sorted(output.rglob("*")):
        if path.is_file() and path.name not in (".lock", "study.journal"):
            content = path.read_bytes()
            if path.name == "evaluation.json":
                values = json.loads(content)
                del values["seconds"]
                content = json.dumps(values).encode()
            found[str(path.relative_to(output))] = content
    return found


class TuningServer:
    """Runs iterative_tuning.py as forked processes that can be killed at any touch of the disk; see stage_server.py."""

    def __init__(self) -> None:
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "stage_server.py")],
            cwd=ROOT,
            env={**os.environ, **single, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout and self._process.stdout.readline() == "ready\n"

    def run(
        self, config: Path, root: Path, *, fault: dict[str, Any] | None = None, script: str = "tests.tuning_runs"
    ) -> dict[str, Any]:
        """One run; the reply holds exit_code, stdout, stderr and the touches of the disk below `root`."""
        request = {"do": "run", "script": script, "argv": ["--config", str(config)], "root": str(root)}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request | {"fault": fault}) + "\n")
        self._process.stdin.flush()
        reply = json.loads(self._process.stdout.readline())
        return reply | {"touches": [tuple(json.loads(line)) for line in reply["trace"].splitlines()]}

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

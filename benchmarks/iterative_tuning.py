"""iterative_tuning.py against the naive loop, against random search, and against image_cluster.py's defaults.

    python benchmarks/iterative_tuning.py staged --rows 6000 --folder runs/bench-tuning    # 1,000 evaluations
    python benchmarks/iterative_tuning.py search                       # 300 evaluations, twenty seeds
    python benchmarks/iterative_tuning.py digits overhead              # does tuning help?

`staged` may be interrupted and started again with the same folder: what is evaluated and what the naive loop has done
stays, with its seconds. The naive loop runs PCA, UMAP, HDBSCAN and the measures anew for each candidate, with
umap-learn, hdbscan and scikit-learn; twenty candidates are measured, and the rest is their mean. Each part merges its
table into benchmarks/results/iterative_tuning.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.image_cluster import make_features  # noqa: E402
from benchmarks.machine import describe_machine, load_average  # noqa: E402
from benchmarks.vector_sets import digit_vectors, garments, separate_garments, uneven_groups  # noqa: E402
from common.backend import CPU  # noqa: E402
from image_parts.settings import ImageSettings  # noqa: E402
from image_parts.tuning.phases import Phase, PhaseResult, PhaseRunner  # noqa: E402
from image_parts.tuning.records import Records  # noqa: E402
from image_parts.tuning.samples import SampleHandle, store_sample  # noqa: E402
from image_parts.tuning.search import Search  # noqa: E402
from image_parts.tuning.space import choice_key, read_space  # noqa: E402
from image_parts.tuning.stages import Sample  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "iterative_tuning.json"

# 4 x 3 x 2 embeddings, x 4 x 6 x 2 x 2 cuts: 2,304 points.
GRID = {
    "reduction.umap_n_neighbors": [10, 15, 30, 50],
    "reduction.umap_components": [5, 10, 20],
    "reduction.umap_min_dist": [0.0, 0.1],
    "clustering.min_samples": [3, 5, 10, 15],
    "clustering.min_cluster_size": [15, 25, 40, 60, 80, 120],
    "clustering.cluster_selection_epsilon": [0.0, 0.1],
    "clustering.cluster_selection_method": ["leaf", "eom"],
}
N_NAIVE = 20

# choice_key: score and digest of the labels
Known = dict[str, tuple[float, str]]


class OneSample:
    """Vectors that are given, where a run has images."""

    def __init__(self, handle: SampleHandle) -> None:
        self._handle = handle

    def of(self, settings: ImageSettings) -> SampleHandle:
        """The same for all settings."""
        return self._handle


def search_vectors(vectors: np.ndarray, folder: Path, *, stages: Path, **tuning: Any) -> tuple[PhaseResult, float]:
    """Search over the grid; returns what was found and the seconds that this start took."""
    settings = ImageSettings.model_validate({"tuning": {"search_space": GRID, **tuning}, "progress": False})
    space = read_space(settings)
    sample = Sample(vectors, np.arange(len(vectors)))
    handle = store_sample(sample, stages, backend=CPU, max_components=settings.reduction.pca_components)
    started = time.perf_counter()
    runner = PhaseRunner(
        Search(
            space,
            settings.tuning,
            name="phase 2",
            journal_path=folder / "study.journal",
            n_evaluations=settings.tuning.max_evaluations,
        ),
        space,
        Phase(2, settings.tuning.max_evaluations),
        samples=OneSample(handle),  # type: ignore[arg-type]
        records=Records(folder),
        first_iteration=1,
        deadline=None if settings.tuning.timeout_s is None else time.monotonic() + settings.tuning.timeout_s,
        tell=lambda evaluation, was_there: None,
    )
    return runner.run(), time.perf_counter() - started


# --- Staged against naive --------------------------------------------------------------------------------------------


def naive_evaluation(vectors: np.ndarray, settings: ImageSettings) -> dict[str, float]:
    """One candidate as one writes it in an afternoon; nothing is kept for the next."""
    import hdbscan
    import umap
    from sklearn.decomposition import PCA
    from sklearn.metrics import silhouette_score
    from sklearn.metrics.pairwise import cosine_similarity
    from sklearn.neighbors import NearestNeighbors

    reduction, clustering = settings.reduction, settings.clustering
    reduced = PCA(n_components=reduction.pca_components, random_state=42).fit_transform(vectors)
    embedding = umap.UMAP(
        n_components=reduction.umap_components, n_neighbors=reduction.umap_n_neighbors,
        min_dist=reduction.umap_min_dist, metric="cosine", random_state=42, n_jobs=1,
    ).fit_transform(reduced)  # fmt: skip
    labels = hdbscan.HDBSCAN(
        min_cluster_size=clustering.min_cluster_size, min_samples=clustering.min_samples,
        cluster_selection_epsilon=clustering.cluster_selection_epsilon,
        cluster_selection_method=clustering.cluster_selection_method, core_dist_n_jobs=1,
    ).fit_predict(embedding)  # fmt: skip
    inside = labels >= 0
    if labels.max() < 1:
        return {"silhouette": float("nan")}
    means = np.stack([vectors[labels == cluster].mean(axis=0) for cluster in range(labels.max() + 1)])
    near = NearestNeighbors(n_neighbors=6, metric="cosine").fit(vectors).kneighbors(vectors)[1][:, 1:]
    foreign = (labels[near] >= 0) & (labels[near] != labels[:, None])
    return {
        "silhouette": float(silhouette_score(vectors[inside], labels[inside], metric="cosine")),
        "silhouette_reduced": float(silhouette_score(embedding[inside], labels[inside])),
        "cosine": float((cosine_similarity(means) - 2 * np.eye(len(means))).max()),
        "cross_ratio": float(max(foreign[labels == cluster].mean() for cluster in range(len(means)))),
    }


def bench_staged(folder: Path, *, n_rows: int, n_evaluations: int, jobs: list[int], timeout_s: float) -> dict[str, Any]:
    """Seconds of the staged search, in as many processes as `jobs` says in turn, and of the naive loop in one."""
    vectors = make_features(n_rows)
    folder.mkdir(parents=True, exist_ok=True)
    state_path = folder / "seconds.json"
    state: dict[str, Any] = {"staged": {}, "naive": [], "loads": []}
    state |= json.loads(state_path.read_text()) if state_path.exists() else {}
    state["loads"].append(load_average())
    deadline = time.monotonic() + timeout_s
    naive_evaluation(make_features(200), ImageSettings())  # imports and compilation in this process
    for n_jobs in jobs:
        staged = state["staged"].setdefault(str(n_jobs), {"clock": 0.0, "cpu": 0.0, "done": False})
        if not staged["done"] and time.monotonic() < deadline:
            time_staged(staged, vectors, folder / f"jobs{n_jobs}", n_evaluations=n_evaluations, n_jobs=n_jobs,
                        timeout_s=deadline - time.monotonic())  # fmt: skip
            state_path.write_text(json.dumps(state))
    chosen = random.Random(0).sample(Records(folder / f"jobs{jobs[0]}" / "_tuning").all(), N_NAIVE)
    if len(state["naive"]) < N_NAIVE:
        naive_evaluation(vectors, ImageSettings())  # compilation, of the sizes that are measured
    while len(state["naive"]) < N_NAIVE and time.monotonic() < deadline:
        settings = ImageSettings.model_validate(chosen[len(state["naive"])].settings)
        started, cpu = time.perf_counter(), time.process_time()
        naive_evaluation(vectors, settings)
        state["naive"].append({"clock": time.perf_counter() - started, "cpu": time.process_time() - cpu})
        state_path.write_text(json.dumps(state))
    return report_staged(state, folder, n_rows=n_rows)


def time_staged(
    staged: dict[str, Any], vectors: np.ndarray, folder: Path, *, n_evaluations: int, n_jobs: int, timeout_s: float
) -> None:
    """Add the seconds of one start of the staged search; worker processes import and compile on its account."""
    from joblib.externals.loky import get_reusable_executor

    cpu = processor_seconds()
    found, seconds = search_vectors(vectors, folder / "_tuning", stages=folder / "stages", search_strategy="grid",
                                    max_evaluations=n_evaluations, n_jobs=n_jobs, timeout_s=timeout_s)  # fmt: skip
    if n_jobs != 1:
        get_reusable_executor().shutdown(wait=True)  # only then their seconds are known
    staged["clock"] += seconds
    staged["cpu"] += processor_seconds() - cpu
    staged["done"] = found.is_finished


def processor_seconds() -> float:
    """Of this process and of all its processes that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def report_staged(state: dict[str, Any], folder: Path, *, n_rows: int) -> dict[str, Any]:
    """The table of `bench_staged`; incomplete where a side is not through."""
    table: dict[str, Any] = {"rows": n_rows, "naive_measured": len(state["naive"]), "loads": state["loads"]}
    table["complete"] = len(state["naive"]) == N_NAIVE and all(staged["done"] for staged in state["staged"].values())
    naive = {key: statistics.mean(one[key] for one in state["naive"]) for key in ("clock", "cpu") if state["naive"]}
    table |= {f"naive_{key}_s_each": round(mean, 2) for key, mean in naive.items()}
    for n_jobs, staged in state["staged"].items():
        evaluations = Records(folder / f"jobs{n_jobs}" / "_tuning").all()
        table[f"jobs{n_jobs}"] = {
            "evaluations": len(evaluations),
            "distinct_labels": len({found.labels_sha256 for found in evaluations}),
            **{f"{key}_s": round(staged[key], 1) for key in ("clock", "cpu")},
            **{f"{key}_ratio": round(naive[key] * len(evaluations) / staged[key], 1) for key in naive},
        }
    return table


# --- Search strategies -----------------------------------------------------------------------------------------------


SETS = {
    "digits": digit_vectors,
    "fashion-like": garments,
    "fashion-like, apart": separate_garments,
    "uneven": uneven_groups,
}


def bench_search(folder: Path, *, n_rows: int, n_evaluations: int, n_seeds: int, n_jobs: int) -> dict[str, Any]:
    """Best scores of random search, evolution and TPE, from a grid that was gone through once."""
    tables: dict[str, Any] = {}
    for name, make_vectors in SETS.items():
        vectors, _ = make_vectors(n_rows)
        stages = folder / f"{name}-stages"
        grid, _ = search_vectors(vectors, folder / f"{name}-grid", stages=stages, search_strategy="grid",
                                 max_evaluations=10_000, n_jobs=n_jobs)  # fmt: skip
        known = {choice_key(found.choice): (float(found.score or 0), str(found.labels_sha256))
                 for found in grid.evaluations}  # fmt: skip
        tables[name] = compare_strategies(known, folder / name, n_evaluations=n_evaluations, n_seeds=n_seeds)
        tables[name]["vectors"] = list(vectors.shape)
        print(json.dumps({name: tables[name]}), flush=True)
    return tables


def compare_strategies(known: Known, folder: Path, *, n_evaluations: int, n_seeds: int) -> dict[str, Any]:
    """Searches over known scores: what a strategy finds depends on nothing but what it proposes."""
    optimum = max(score for score, _ in known.values())
    best: dict[str, list[float]] = {"random": [], "evolution": [], "tpe": []}
    for seed in range(n_seeds):
        drawn = random.Random(seed).sample(sorted(known), min(n_evaluations, len(known)))
        best["random"].append(max(known[key][0] for key in drawn))
        for strategy in ("evolution", "tpe"):
            journal = folder / f"{strategy}-{seed}.journal"
            journal.parent.mkdir(parents=True, exist_ok=True)
            journal.unlink(missing_ok=True)
            best[strategy].append(
                search_known(known, journal, strategy=strategy, seed=seed, n_evaluations=n_evaluations)
            )
    gaps = {name: [100 * (optimum - value) / abs(optimum) for value in values] for name, values in best.items()}
    return {
        "points": len(known), "evaluations": n_evaluations, "seeds": n_seeds, "grid_optimum": round(optimum, 5),
        "random_search": random_search(known, n_evaluations),
        "best": {name: [round(value, 5) for value in values] for name, values in best.items()},
        "mean_gap_percent": {name: round(statistics.mean(values), 3) for name, values in gaps.items()},
        "worst_gap_percent": {name: round(max(values), 3) for name, values in gaps.items()},
        "optimum_found": {name: sum(gap < 1e-9 for gap in values) for name, values in gaps.items()},
        "seeds_worse_than_random": {
            name: sum(ours > chance + 1e-9 for ours, chance in zip(gaps[name], gaps["random"], strict=True))
            for name in ("evolution", "tpe")
        },
    }  # fmt: skip


def random_search(known: Known, n_evaluations: int, *, n_draws: int = 1000) -> dict[str, float]:
    """What random search finds on average, where a few seeds of it say little."""
    scores = [score for score, _ in known.values()]
    optimum, rng = max(scores), random.Random("random search")
    gaps = [100 * (optimum - max(rng.sample(scores, n_evaluations))) / abs(optimum) for _ in range(n_draws)]
    found = sum(gap == 0 for gap in gaps) / n_draws
    return {"draws": n_draws, "mean_gap_percent": round(statistics.mean(gaps), 3), "optimum_found": found}


def search_known(known: Known, journal: Path, *, strategy: str, seed: int, n_evaluations: int) -> float:
    """The best score that a search finds within `n_evaluations` new candidates."""
    from image_parts.tuning.search import Outcome

    tuning = {"search_space": GRID, "search_strategy": strategy, "seed": seed, "max_evaluations": n_evaluations}
    space = read_space(ImageSettings.model_validate({"tuning": tuning}))
    search = Search(space, space.base.tuning, name="phase 2", journal_path=journal, n_evaluations=n_evaluations)
    seen: dict[str, float] = {}
    while len(seen) < n_evaluations and search.n_idle < 25:
        proposals, outcomes = search.propose(), []
        for proposal in proposals:
            key = choice_key(proposal.choice)
            score, labels = known.get(key, (None, None))
            is_new = score is not None and key not in seen and len(seen) < n_evaluations
            if is_new and score is not None:
                seen[key] = score
            skipped = "unfit" if score is None else None
            outcomes.append(Outcome(score, proposal.number + 1, is_new, skipped=skipped, labels=labels))
        search.tell(proposals, outcomes)
    return max(seen.values())


# --- Does tuning help? -----------------------------------------------------------------------------------------------


def bench_digits(folder: Path, *, n_jobs: int, n_evaluations: int) -> dict[str, Any]:
    """The digit images with the defaults of image_cluster.py, and with the best of a search that saw no label."""
    import iterative_tuning
    from demo.digit_images import DIGIT_VALUES, write_digit_images

    images = folder / "images"
    if not images.exists():
        write_digit_images(images)
    # hog, as no network is at hand, set for 8 x 8 pixels. All keys of reduction and clustering are the defaults.
    values = {name: DIGIT_VALUES[name] for name in ("model", "preprocessing", "purity")}
    tuning = {"search_space": GRID, "max_evaluations": n_evaluations, "n_jobs": n_jobs}
    settings = ImageSettings.model_validate(
        {**values, "input_dir": str(images), "output_dir": str(folder / "out"), "progress": False,
         "cache": {"cache_dir": str(folder / "cache")}, "tuning": tuning}
    )  # fmt: skip
    iterative_tuning.run(settings, overwrite=True)
    summary = json.loads((folder / "out" / "tuning_summary_latest.json").read_text())
    return {
        name: {key: summary["truth"][name][key] for key in ("acc", "nmi", "ari", "n_clusters")}
        for name in ("base", "best")
    } | {"choice": summary["best"]["choice"], "evaluations": summary["n_evaluations"]}


# --- Overhead --------------------------------------------------------------------------------------------------------


def bench_overhead(folder: Path, *, n_evaluations: int) -> dict[str, Any]:
    """Milliseconds of all that is not reduction, clustering and measuring, for each evaluation, with tiny vectors."""
    vectors = make_features(150)
    table = {}
    for strategy in ("grid", "evolution", "tpe"):
        options = {"search_strategy": strategy, "max_evaluations": n_evaluations}
        found, seconds = search_vectors(vectors, folder / strategy, stages=folder / "stages", **options)
        working = sum(evaluation.seconds for evaluation in found.evaluations)
        table[strategy] = round(1000 * (seconds - working) / len(found.evaluations), 2)
    return {"ms_per_evaluation": table, "evaluations": n_evaluations}


def save(part: str, table: dict[str, Any], load_before: float) -> None:
    """Merge one part into the results."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["machine"] = describe_machine()
    results[part] = {**table, "load_before": load_before, "load_after": load_average()}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results[part], indent=2))


def main() -> None:
    """Run the parts that are asked for; all without any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["overhead", "digits", "search", "staged"])
    parser.add_argument("--rows", type=int, default=6000, help="of `staged`")
    parser.add_argument("--search-rows", type=int, default=600, help="of each set of `search`")
    parser.add_argument("--seeds", type=int, default=20, help="of `search`")
    parser.add_argument("--evaluations", type=int, default=1000, help="of `staged`")
    parser.add_argument("--jobs", type=int, default=-1, help="processes of the others")
    parser.add_argument("--staged-jobs", type=int, nargs="+", default=[1, 2], help="processes of `staged`, in turn")
    parser.add_argument("--timeout", type=float, default=1e9, help="seconds after which `staged` pauses")
    parser.add_argument("--folder", type=Path, help="keeps what was computed; a temporary folder without it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for part in arguments.parts:
            load = load_average()
            if part == "staged":
                table = bench_staged(folder / "staged", n_rows=arguments.rows, n_evaluations=arguments.evaluations,
                                     jobs=arguments.staged_jobs, timeout_s=arguments.timeout)  # fmt: skip
            elif part == "search":
                table = bench_search(folder / "search", n_rows=arguments.search_rows, n_evaluations=300,
                                     n_seeds=arguments.seeds, n_jobs=arguments.jobs)  # fmt: skip
            elif part == "digits":
                table = bench_digits(folder / "digits", n_jobs=arguments.jobs, n_evaluations=300)
            else:
                table = bench_overhead(folder / "overhead", n_evaluations=300)
            save(part, table, load)


if __name__ == "__main__":
    main()

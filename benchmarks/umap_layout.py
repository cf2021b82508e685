"""The layout of common/umap_steps.py against umap-learn's own loop: seconds, and how good the embeddings are.

    python benchmarks/umap_layout.py                      # four sets, ten seeds, about seven minutes
    python benchmarks/umap_layout.py --seeds 2 --only digits

Both start from the same graph, places and generators of one seed, in turn, in one thread. An embedding is judged by its
trustworthiness and by what HDBSCAN finds on it: ARI and NMI against the true labels. After some epochs no two ways of
rounding agree, so what counts is whether both sides differ by more than seeds do. "Between seeds" is the ARI of
umap-learn's clusters with those of its other seeds, "same seed" that of both sides. Merges its tables into
benchmarks/results/umap_layout.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.iterative_tuning import SETS  # noqa: E402
from benchmarks.machine import describe_machine, load_average  # noqa: E402
from common.density import cluster_hdbscan  # noqa: E402
from common.neighbors import Neighbors, exact_neighbors  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "umap_layout.json"
# Components and min_dist: what clusters are sought in, and what a picture shows.
SHAPES = ((10, 0.0), (2, 0.1))
N_ROWS, N_NEIGHBORS, N_EPOCHS = 1797, 15, 500
MEASURES = ("trustworthiness", "ari", "nmi", "clusters", "noise", "seconds")


def prepare(vectors: np.ndarray, found: Neighbors, *, n_components: int, min_dist: float, seed: int) -> dict[str, Any]:
    """What both sides start from: edges with their periods, first places, the generators' seeds, and the curve."""
    from umap.umap_ import find_ab_params, make_epochs_per_sample

    from common.spectral_start import first_places
    from common.umap_graph import fuzzy_graph
    from common.umap_layout import draw_seeds, drop_unsampled
    from common.umap_steps import count_samples

    n = len(vectors)
    graph = fuzzy_graph(
        np.hstack([np.arange(n, dtype=np.int32)[:, None], found.indices]),
        np.hstack([np.zeros((n, 1), np.float32), found.distances]),
    )
    graph = drop_unsampled(graph, N_EPOCHS)
    random = np.random.RandomState(seed)
    places = first_places(graph, vectors, n_components, random, metric="cosine")
    return {
        "places": places, "indptr": graph.indptr, "tails": graph.tails,
        "periods": make_epochs_per_sample(graph.strengths, N_EPOCHS),
        "samples": count_samples(graph.strengths, N_EPOCHS),  # in the place of the strengths
        "seeds": draw_seeds(random),
        "curve": find_ab_params(1.0, min_dist),
    }  # fmt: skip


def by_umap_learn(start: dict[str, Any]) -> np.ndarray:
    """The loop of the package, in one thread as it runs with a seed."""
    from umap.layouts import optimize_layout_euclidean

    places, n = start["places"].copy(), len(start["places"])
    heads = np.repeat(np.arange(n, dtype=np.int32), np.diff(start["indptr"]))
    embedding: np.ndarray = optimize_layout_euclidean(
        places, places, heads, start["tails"], N_EPOCHS, n, start["periods"], *start["curve"], start["seeds"],
        1.0, 1.0, 5, move_other=True,
    )  # fmt: skip
    return embedding


def by_ours(start: dict[str, Any]) -> np.ndarray:
    """The loop of this repository."""
    from common.umap_steps import run_epochs

    return run_epochs(
        start["places"], start["indptr"], start["tails"], start["samples"],
        curve=start["curve"], seeds=start["seeds"], n_epochs=N_EPOCHS,
    )  # fmt: skip


SIDES = {"umap-learn": by_umap_learn, "ours": by_ours}


def compare(
    vectors: np.ndarray, truth: np.ndarray, *, n_components: int, min_dist: float, n_seeds: int
) -> dict[str, Any]:
    """Means and spreads over the seeds, for both sides."""
    found = exact_neighbors(vectors, N_NEIGHBORS - 1)
    rows: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    labels: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
    for seed in range(n_seeds):
        start = prepare(vectors, found, n_components=n_components, min_dist=min_dist, seed=seed)
        for side, lay_out in SIDES.items():
            started = time.perf_counter()
            embedding = lay_out(start)
            seconds = time.perf_counter() - started
            labels[side].append(cluster_hdbscan(embedding, min_cluster_size=25, min_samples=5).labels)
            rows[side].append([*judge(vectors, embedding, labels[side][-1], truth), seconds])
    table: dict[str, Any] = {side: summarise(np.array(rows[side])) for side in SIDES}
    gaps = np.array(rows["ours"]) - np.array(rows["umap-learn"])
    # Below 2 a gap is within chance.
    errors = gaps.std(axis=0, ddof=1) / np.sqrt(n_seeds)
    table["gap_in_standard_errors"] = dict(
        zip(MEASURES[:3], (gaps.mean(axis=0) / np.maximum(errors, 1e-12)).round(2).tolist(), strict=False)
    )
    return table | agreement(labels)


def judge(vectors: np.ndarray, embedding: np.ndarray, labels: np.ndarray, truth: np.ndarray) -> list[float]:
    """All MEASURES but the seconds."""
    from sklearn.manifold import trustworthiness
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    return [
        trustworthiness(vectors, embedding, n_neighbors=15, metric="cosine"),
        adjusted_rand_score(truth, labels),
        normalized_mutual_info_score(truth, labels),
        float(labels.max() + 1),
        float(np.mean(labels < 0)),
    ]


def summarise(rows: np.ndarray) -> dict[str, list[float]]:
    """Mean and standard deviation of each measure."""
    pairs = zip(rows.mean(axis=0), rows.std(axis=0, ddof=1), strict=True)
    return {name: [round(mean, 4), round(spread, 4)] for name, (mean, spread) in zip(MEASURES, pairs, strict=True)}


def agreement(labels: dict[str, list[np.ndarray]]) -> dict[str, float]:
    """The ARI of clusters of both sides with the same seed, and of umap-learn's between seeds."""
    from sklearn.metrics import adjusted_rand_score

    theirs = labels["umap-learn"]
    same = [adjusted_rand_score(a, b) for a, b in zip(theirs, labels["ours"], strict=True)]
    between = [adjusted_rand_score(a, b) for a, b in itertools.combinations(theirs, 2)]
    return {
        "ari_same_seed": round(statistics.mean(same), 3),
        "ari_between_seeds": round(statistics.mean(between), 3),
    }


def main() -> None:
    """Compare on the sets that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="at least 2")
    parser.add_argument("--only", nargs="*", choices=sorted(SETS), default=sorted(SETS))
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {"machine": describe_machine(), "seeds": arguments.seeds, "epochs": N_EPOCHS}
    vectors, truth = SETS["digits"](300)
    compare(vectors, truth, n_components=2, min_dist=0.1, n_seeds=2)  # imports and compilation, on nobody's account
    for name in arguments.only:
        vectors, truth = SETS[name](N_ROWS)
        for n_components, min_dist in SHAPES:
            table = compare(vectors, truth, n_components=n_components, min_dist=min_dist, n_seeds=arguments.seeds)
            results[f"{name}, {n_components} components"] = table | {"rows": len(vectors), "load": load_average()}
            print(json.dumps({f"{name}, {n_components} components": table}), flush=True)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

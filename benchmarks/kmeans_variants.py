"""Compare ways to train k-means at large k with scikit-learn's, to choose settings: inertia, wall and CPU seconds.

    python benchmarks/kmeans_variants.py --rows 500000 --clusters 1000 --repeats 3 --full-peer

Peers come first in each round and rounds are interleaved, so that a busy machine slows all alike. `--full-peer` adds
scikit-learn's KMeans, once for each data set: minutes at these sizes.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.kmeans import assign, train_lloyd, train_minibatch

N_DIMENSIONS = 64


# ---- data ----------------------------------------------------------------------------------------------------------


def make_mixture(n_rows: int, *, n_components: int) -> np.ndarray:
    """Draw gaussians of unequal sizes and widths, and a tenth of noise."""
    rng = np.random.default_rng(0)
    means = rng.standard_normal((n_components, N_DIMENSIONS), dtype=np.float32)
    widths = rng.uniform(0.2, 0.6, n_components).astype(np.float32)
    component = rng.choice(n_components, size=n_rows, p=rng.dirichlet(np.ones(n_components)))
    noise = rng.standard_normal((n_rows, N_DIMENSIONS), dtype=np.float32)
    vectors = means[component] + noise * widths[component, None]
    is_noise = rng.random(n_rows) < 0.1
    vectors[is_noise] = noise[is_noise] * np.float32(1.2)
    return vectors


def make_pca_like(n_rows: int, *, n_components: int) -> np.ndarray:
    """Draw unit rows with topics inside topics and a falling spectrum, as a PCA of text embeddings gives."""
    rng = np.random.default_rng(1)
    topics = rng.standard_normal((60, N_DIMENSIONS))
    subtopics = 0.7 * topics[rng.integers(60, size=n_components)] + 0.7 * rng.standard_normal(
        (n_components, N_DIMENSIONS)
    )
    component = rng.choice(n_components, size=n_rows, p=rng.dirichlet(np.full(n_components, 0.7)))
    noise = rng.standard_normal((n_rows, N_DIMENSIONS), dtype=np.float32)
    spectrum = (np.arange(1, N_DIMENSIONS + 1) ** -0.5).astype(np.float32)
    vectors = (subtopics[component].astype(np.float32) + np.float32(0.9) * noise) * spectrum
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# ---- variants ------------------------------------------------------------------------------------------------------


def variants(vectors: np.ndarray, *, n_clusters: int, full_peer: bool) -> dict[str, Callable[[int], np.ndarray]]:
    """Name each way to train; a way takes a seed and gives centroids."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    def batches() -> Iterator[np.ndarray]:
        return (vectors[start : start + 65_536] for start in range(0, len(vectors), 65_536))

    def kmeans(seed: int) -> np.ndarray:
        return KMeans(n_clusters, random_state=seed).fit(vectors).cluster_centers_

    def minibatch_kmeans(seed: int, *, size: int) -> np.ndarray:
        return MiniBatchKMeans(n_clusters, batch_size=size, random_state=seed).fit(vectors).cluster_centers_

    def lloyd(seed: int, *, n_passes: int) -> np.ndarray:
        return train_lloyd(batches, n_clusters=n_clusters, max_epochs=n_passes, random_state=seed).centroids

    def minibatch_then_polish(seed: int) -> np.ndarray:
        start = train_minibatch(batches, n_clusters=n_clusters, max_epochs=1, random_state=seed).centroids
        return train_lloyd(batches, n_clusters=n_clusters, init=start, max_epochs=3).centroids

    ways: dict[str, Callable[[int], np.ndarray]] = {"sklearn KMeans": kmeans} if full_peer else {}
    ways |= {f"sklearn MiniBatchKMeans {size}": partial(minibatch_kmeans, size=size) for size in (1024, 8192)}
    ways |= {f"train_lloyd, up to {n_passes} passes": partial(lloyd, n_passes=n_passes) for n_passes in (3, 10)}
    return ways | {"train_minibatch 1 pass, polish 3": minibatch_then_polish}


def main() -> None:
    """Run all variants on both data sets and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full-peer", action="store_true")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}")
    for make in (make_mixture, make_pca_like):
        vectors = make(args.rows, n_components=args.clusters * 3 // 2)
        ways = variants(vectors, n_clusters=args.clusters, full_peer=args.full_peer)
        runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
        for seed in range(args.repeats):
            for name, train in ways.items():
                if name == "sklearn KMeans" and seed:
                    continue
                wall, cpu = time.perf_counter(), time.process_time()
                centroids = train(seed)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                inertia = float(assign(vectors, centroids)[1].sum(dtype=np.float64))
                runs[name].append((inertia, wall, cpu))
                print(f"{name}, seed {seed}: inertia {inertia:.6g}, {wall:.2f} s, cpu {cpu:.2f} s", file=sys.stderr)
        for name, measured in runs.items():
            inertia, wall, cpu = np.median(np.array(measured), axis=0)
            print(
                f"{make.__name__:14} {name:32} inertia {inertia:12.6g}  wall {wall:7.2f} s  cpu {cpu:7.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()

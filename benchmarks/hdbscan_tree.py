"""The single-linkage tree of common/single_linkage.py against the hdbscan package's: seconds, memory, and its length.

    python benchmarks/hdbscan_tree.py                                 # four sets, ten minutes
    python benchmarks/hdbscan_tree.py --only embedding --repeats 1

The package's tree is approximate unless it is told otherwise, and that is how most use it, so it is the peer for speed;
its exact tree must be as long as ours. Rows come from generators with fixed seeds. Each side builds a small tree before
its clock starts, since ours is compiled on the first call.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.measure import Cost, Side, Work, run_interleaved  # noqa: E402
from benchmarks.outcomes import Finding, Outcome, Page, print_outcome  # noqa: E402

PAGE = Page("hdbscan_tree", "HDBSCAN's tree against the hdbscan package's")
MIN_SAMPLES = 10
# Rows of the tree that is built before the clock starts.
_N_BEFORE = 1000


def blobs(n_rows: int, n_dimensions: int, *, n_blobs: int, spread: float) -> np.ndarray:
    """Rows about centres, some of them wide and some narrow."""
    rng = np.random.default_rng(0)
    centers, widths = rng.standard_normal((n_blobs, n_dimensions)) * spread, np.geomspace(0.2, 1, n_blobs)
    of = rng.integers(n_blobs, size=n_rows)
    return (centers[of] + rng.standard_normal((n_rows, n_dimensions)) * widths[of, None]).astype(np.float32)


def sheets(n_rows: int, n_dimensions: int, *, n_sheets: int, spread: float) -> np.ndarray:
    """Rows on sheets of three dimensions about centres, as in embeddings, which have fewer than they are given."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((n_sheets, n_dimensions)) * spread
    planes = rng.standard_normal((n_sheets, 3, n_dimensions)) / n_dimensions**0.5
    of = rng.integers(n_sheets, size=n_rows)
    rows = np.einsum("ni,nid->nd", rng.standard_normal((n_rows, 3)), planes[of], optimize=True)
    return (centers[of] + rows + 0.02 * rng.standard_normal((n_rows, n_dimensions))).astype(np.float32)


def uniform(n_rows: int, n_dimensions: int) -> np.ndarray:
    """Rows without any cluster."""
    return np.random.default_rng(0).random((n_rows, n_dimensions), np.float32)


SETS: dict[str, tuple[str, Callable[[], np.ndarray]]] = {
    "embedding": ("200,000 x 10, 60 clusters of 3 dimensions", lambda: sheets(200_000, 10, n_sheets=60, spread=2)),
    "blobs": ("100,000 x 10, 60 clusters", lambda: blobs(100_000, 10, n_blobs=60, spread=5)),
    "picture": ("100,000 x 2, no clusters", lambda: uniform(100_000, 2)),
    "wide": ("20,000 x 50, 50 clusters", lambda: blobs(20_000, 50, n_blobs=50, spread=1)),
}


def package(*, data: str, is_exact: bool) -> Work:
    """By the hdbscan package, as its estimator calls it, in one process."""
    import hdbscan

    vectors = np.load(data)

    def build(rows: np.ndarray) -> np.ndarray:
        tree: np.ndarray = hdbscan.hdbscan(
            rows.astype(np.float64), min_cluster_size=len(rows), min_samples=MIN_SAMPLES, core_dist_n_jobs=1,
            approx_min_span_tree=not is_exact,
        )[4]  # fmt: skip
        return tree

    build(vectors[:_N_BEFORE])
    return lambda: {"length": float(np.sort(build(vectors)[:, 2]).sum())}


def ours(*, data: str) -> Work:
    """By common/single_linkage.py."""
    from common.single_linkage import single_linkage

    vectors = np.load(data)
    single_linkage(vectors[:_N_BEFORE], min_samples=MIN_SAMPLES)
    return lambda: {"length": float(np.sort(single_linkage(vectors, min_samples=MIN_SAMPLES)[:, 2]).sum())}


def compare(name: str, folder: Path, *, repeats: int) -> Outcome:
    """One set, by both of the package's trees and by ours."""
    title, make = SETS[name]
    vectors = make()
    np.save(folder / f"{name}.npy", vectors)
    data = {"data": str(folder / f"{name}.npy")}
    by_package = "benchmarks.hdbscan_tree:package"
    sides = {
        "hdbscan": Side(by_package, {**data, "is_exact": False}),
        "hdbscan, exact": Side(by_package, {**data, "is_exact": True}),
        "common/single_linkage.py": Side("benchmarks.hdbscan_tree:ours", data),
    }
    costs = run_interleaved(sides, repeats=repeats)
    theirs, exact, mine = costs.values()
    findings = [
        Finding.speed("the tree, against the package's approximate one", theirs, mine, at_least=1.0),
        Finding.speed("the same, against its exact one", exact, mine, at_least=None),
        Finding.at_most("relative difference of its length to the exact one", _excess(mine, exact), 1e-12),
        Finding.fact("how much longer the approximate one is, relatively", _excess(theirs, exact)),
        Finding.fact("bytes a row, ours", _bytes_a_row(mine, len(vectors))),
        Finding.fact("bytes a row, hdbscan", _bytes_a_row(theirs, len(vectors))),
    ]
    return Outcome(f"{name}: {title}", costs, findings)


def _excess(one: Cost, other: Cost) -> float:
    return abs(one.result["length"] / other.result["length"] - 1)


def _bytes_a_row(cost: Cost, n_rows: int) -> float:
    return round((cost.peak_mib - cost.set_up_mib) * 2**20 / n_rows)


def main() -> None:
    """Compare on the sets that are asked for; what runs with fewer repeats is printed and not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(SETS), default=list(SETS))
    parser.add_argument("--repeats", type=int, default=3, help="the page keeps three or more")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            outcome = compare(name, Path(folder), repeats=arguments.repeats)
            print_outcome(outcome)
            if arguments.repeats >= 3:
                PAGE.save(name, outcome)


if __name__ == "__main__":
    main()

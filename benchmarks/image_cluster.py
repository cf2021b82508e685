"""image_cluster.py against the plain way: decoding with preprocessing, purity, a run from cached features, and memory.

    python benchmarks/image_cluster.py                      # all, three rounds each (one of the whole run)
    python benchmarks/image_cluster.py --only purity --rows 5000

The plain sides are what one writes with OpenCV, scikit-learn, umap-learn and hdbscan in an afternoon. Every side runs
in a process of its own, rounds are interleaved. At full size the results go to benchmarks/results/image_cluster.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.image_memory import N_DIMENSIONS, NOISE, memory_findings, write_input  # noqa: E402
from benchmarks.measure import Cost, Side, Work, run_interleaved  # noqa: E402
from benchmarks.outcomes import Finding, Outcome, Page, print_outcome  # noqa: E402

PAGE = Page(
    "image_cluster",
    "image_cluster against the plain way",
    notes=(
        "The purity step follows UMAP, which has loaded numba by then, so that is set-up here; a process of its "
        "own would wait for it once, 0.3 s.",
        "",
        "Earlier figures of the purity step, on the same machine, idle: 11.8x with the silhouette of all, 12.5x "
        "with that of a sample of 10,000; and before that 9.3x with the silhouette of all, 7.6x with that of a "
        "sample of 10,000 (16.21 s against 1.75 and 2.14 s, two runs, with numba's loading in ours). Scores are "
        "now selected tile by tile, in compiled code, while the tile is in the cache, and most pairs are ruled "
        "out by a bound in 64 directions before they are multiplied whole, where the features have such "
        "directions.",
        "",
        "Features to verdict was 3.6x before (57.7 s against 16.0 s; processor seconds 3.8x), when other work "
        "began on the machine in the midst of it.",
        "",
        "Memory is that of the command itself, from the scan of the folder to the sorted files, on images of 8 x "
        "8 pixels with a label each, whose features lie in the cache, and with all that numba compiles compiled "
        "before. The feature matrix, 1,536 bytes a row, is there once, in a file that steps go through part by "
        "part (common/mapped.py): it is in the page cache of the system, which gives it up when memory is short, "
        "and never as a whole in the process. So are the vectors of the PCA, the candidates for neighbours and "
        "the neighbours, UMAP's graph, when its edges are drawn next, and the basis by which its start is found. "
        "The table tells, too, what comes out where the matrix is counted as if it were in memory. The sprite of "
        "the projector, of at most 10,000 images, takes most. Flat is read as everywhere here, no more than a "
        "quarter more at ten times the rows; it is 3 to 5% more at sixteen times, as peaks of one size vary by 2%.",
        "",
        "A step's own growth is what has a row for each image and is looked at in any order: the embedding and "
        "its random generators, the vectors that the start is made of, HDBSCAN's tree, the names, hashes and "
        "labels; some 190 bytes of it, names, hashes and sizes, are there from the scan on. A step counts what "
        "those before it have freed and the allocators have kept.",
        "",
        "Clustering grew by 756 bytes an image with the tree of the hdbscan package, some 600 of them its own, and "
        "would have been the peak of runs of half a million images. Until rows from anywhere in a file were "
        "taken and put part by part, 32 of them brought 53 MiB to memory with 200,000 images.",
        "",
        "Before, the whole run took 922, 917 and 1,022 MiB, and reduction grew by 1,205 bytes a row: 40 Lanczos "
        "vectors and the graph were in memory, and a view of one column kept every table of scores by which the "
        "search for neighbours judges itself. The projector's sprite was there three times. Growth before that, "
        "from 12,500 to 50,000 images: reduction 1,461 bytes a row, files 850, clustering 808, purity 796; and "
        "before that files 2,443, clustering 2,041, reduction 1,539, scan 1,168.",
        "",
        "Beyond 50,000 images neighbours are sought in cells: of 100,000 x 50, 99.9% of them in 5.3 s of the "
        "processor, where comparing all takes 18.2 s, and NN-descent 76.6 s and 440 MiB more. With NN-descent, "
        "reduction alone had taken 1,100 MiB with 200,000 images before its graph was done.",
    ),
)

# Width, height and share of the JPEGs: cameras, scans, screenshots and thumbnails.
_SIZES = ((320, 240, 0.2), (640, 480, 0.3), (1280, 960, 0.3), (1920, 1080, 0.15), (3000, 2000, 0.05))
_IMAGE_SIZE = 224


# --- Data ------------------------------------------------------------------------------------------------------------


def write_jpegs(folder: Path, n_images: int) -> None:
    """Write pictures with smooth and fine structure in mixed sizes."""
    import cv2

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    choices = rng.choice(len(_SIZES), size=n_images, p=[share for *_, share in _SIZES])
    for number, choice in enumerate(choices):
        width, height, _ = _SIZES[choice]
        coarse = cv2.resize(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8), (width, height), interpolation=2)
        fine = cv2.resize(rng.integers(0, 60, (height // 4, width // 4, 3), dtype=np.uint8), (width, height))
        cv2.imwrite(str(folder / f"{number:05d}.jpg"), cv2.add(coarse, fine), [cv2.IMWRITE_JPEG_QUALITY, 90])


def make_features(
    n_rows: int, n_dimensions: int = N_DIMENSIONS, n_clusters: int = 40, noise: float = 0.6
) -> np.ndarray:
    """Draw unit vectors as a vision network gives them: clusters, and a spectrum that falls."""
    rng = np.random.default_rng(0)
    spectrum = (np.arange(1, n_dimensions + 1) ** -0.5).astype(np.float32)
    means = rng.standard_normal((n_clusters, n_dimensions)) * spectrum
    offsets = rng.standard_normal((n_rows, n_dimensions)) * spectrum
    vectors = (means[rng.integers(n_clusters, size=n_rows)] + noise * offsets).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# --- Decode and preprocess -------------------------------------------------------------------------------------------


def plain_decode(*, folder: str) -> Work:
    """One loop: decode, grey, resize, CLAHE."""
    import cv2

    paths = sorted(Path(folder).iterdir())

    def work() -> dict[str, Any]:
        clahe, total = cv2.createCLAHE(3.0, (8, 8)), 0
        for path in paths:
            grey = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2GRAY)
            resized = cv2.resize(grey, (_IMAGE_SIZE, _IMAGE_SIZE), interpolation=cv2.INTER_AREA)
            total += int(clahe.apply(resized)[0, 0])
        return {"n_images": len(paths)}

    return work


def our_decode(*, folder: str, polarity_invariant: bool) -> Work:
    """The decoder and the preprocessing of image_cluster.py, in threads."""
    from image_parts.preparation import Job, prepare_ahead
    from image_parts.scan import n_workers_of
    from image_parts.settings import ImageSettings

    jobs = [Job(row, str(row), path, None) for row, path in enumerate(sorted(Path(folder).iterdir()))]
    values = {"preprocessing": {"resize": "squash", "polarity_invariant": polarity_invariant}}
    settings = ImageSettings.model_validate(values)

    def work() -> dict[str, Any]:
        n_done = sum(outcome.array is not None for outcome in prepare_ahead(jobs, settings, n_workers_of(-1)))
        return {"n_images": n_done}

    return work


# --- Purity ----------------------------------------------------------------------------------------------------------


def plain_purity(*, data: str) -> Work:
    """Silhouette and neighbours by scikit-learn, the rest by hand."""
    from sklearn.metrics import silhouette_score
    from sklearn.metrics.pairwise import cosine_similarity
    from sklearn.neighbors import NearestNeighbors

    arrays = _load(data)
    vectors, embedding, labels = arrays["vectors"], arrays["embedding"], arrays["labels"]

    def work() -> dict[str, Any]:
        inside = labels >= 0
        clusters = np.unique(labels[inside])
        cosines = cosine_similarity(np.stack([vectors[labels == cluster].mean(axis=0) for cluster in clusters]))
        np.fill_diagonal(cosines, -1)
        silhouette = silhouette_score(embedding[inside], labels[inside])
        neighbors = NearestNeighbors(n_neighbors=6, metric="cosine").fit(vectors).kneighbors(vectors)[1][:, 1:]
        near = labels[neighbors]
        foreign = (near >= 0) & (near != labels[:, None])
        ratio = max(foreign[labels == cluster].mean() for cluster in clusters)
        return {"cosine": float(cosines.max()), "silhouette": float(silhouette), "cross_ratio": float(ratio)}

    return work


def our_purity(*, data: str, sample_size: int) -> Work:
    """The purity step of image_cluster.py."""
    _import_what_ran_before()
    from common.mapped import mapped_matrix
    from image_parts.purity import measure_purity
    from image_parts.settings import PuritySettings

    arrays = _load(data)
    plain = arrays.pop("vectors")
    arrays["vectors"] = mapped_matrix(plain.shape, folder=Path(data).parent)  # where a run has them
    arrays["vectors"][:] = plain
    settings = PuritySettings(silhouette_sample_size=sample_size)

    def work() -> dict[str, Any]:
        found = measure_purity(arrays["vectors"], arrays["embedding"], arrays["labels"], settings).metrics
        return {
            "cosine": found["max_centroid_cosine"],
            "silhouette": found["silhouette"],
            "cross_ratio": found["max_nn_cross_ratio"],
        }

    return work


def _import_what_ran_before() -> None:
    """Imports are set-up on both sides. Ours never comes before UMAP, which loads the whole of numba."""
    import umap  # noqa: F401

    import common.best_scores
    import common.distance_sums  # noqa: F401


# --- The whole, features at hand -------------------------------------------------------------------------------------


def plain_whole(*, data: str) -> Work:
    """PCA, UMAP, HDBSCAN, then the plain purity step."""
    import hdbscan
    import umap
    from sklearn.decomposition import PCA

    vectors = _load(data)["vectors"]

    def work() -> dict[str, Any]:
        reduced = PCA(n_components=50, random_state=42).fit_transform(vectors)
        embedding = umap.UMAP(n_components=10, metric="cosine", random_state=42, n_jobs=1).fit_transform(reduced)
        model = hdbscan.HDBSCAN(min_cluster_size=50, min_samples=10, cluster_selection_method="leaf").fit(embedding)
        with tempfile.TemporaryDirectory() as folder:
            path = _save(Path(folder) / "data.npz", vectors=vectors, embedding=embedding, labels=model.labels_)
            return {"n_clusters": int(model.labels_.max()) + 1, **plain_purity(data=path)()}

    return work


def our_whole(*, data: str) -> Work:
    """The reduction, clustering and purity step of image_cluster.py."""
    from common.backend import CPU
    from image_parts.features import Features
    from image_parts.pipeline import cluster_features
    from image_parts.purity import measure_purity
    from image_parts.settings import ImageSettings

    vectors = _load(data)["vectors"]
    features = Features([], np.arange(len(vectors)), vectors, [], None, len(vectors), 0)
    values = {"clustering": {"noise_handling": "separate"}, "purity": {"silhouette_sample_size": len(vectors)}}
    settings = ImageSettings.model_validate(values)

    def work() -> dict[str, Any]:
        reduced, assignment = cluster_features(features, settings, backend=CPU)
        report = measure_purity(vectors, reduced.embedding, assignment.labels, settings.purity)
        return report.metrics

    return work


# --- The comparisons -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """How much of everything, and where to work."""

    folder: Path
    n_images: int
    n_rows: int
    repeats: int


def compare_decode(bench: Bench) -> Outcome:
    """Mixed JPEGs, one loop against threads; our second line does both polarities, which the loop does not."""
    write_jpegs(bench.folder / "jpegs", bench.n_images)
    arguments = {"folder": str(bench.folder / "jpegs")}
    ours = "benchmarks.image_cluster:our_decode"
    sides = {
        "OpenCV in a loop": Side("benchmarks.image_cluster:plain_decode", arguments),
        "image_cluster": Side(ours, {**arguments, "polarity_invariant": False}),
        "image_cluster, both polarities": Side(ours, {**arguments, "polarity_invariant": True}),
    }
    costs = run_interleaved(sides, repeats=bench.repeats)
    plain, one, both = costs.values()
    findings = [
        Finding.speed("decode + preprocess", plain, one, at_least=1.8),
        Finding.speed("with both polarities, which the loop does not make", plain, both, at_least=None),
    ]
    return Outcome(f"decode + preprocess: {bench.n_images:,} JPEGs of mixed size", costs, findings)


def compare_purity(bench: Bench) -> Outcome:
    """The same three measures of the same clusters."""
    data = _write_clusters(bench.folder / "purity.npz", bench.n_rows)
    shapeless = _write_clusters(bench.folder / "shapeless.npz", bench.n_rows, has_clusters=False)
    ours = "benchmarks.image_cluster:our_purity"
    sides = {
        "scikit-learn": Side("benchmarks.image_cluster:plain_purity", {"data": data}),
        "image_cluster, silhouette of all": Side(ours, {"data": data, "sample_size": bench.n_rows}),
        "image_cluster, silhouette of 10,000": Side(ours, {"data": data, "sample_size": 10_000}),
        "image_cluster, features without clusters": Side(ours, {"data": shapeless, "sample_size": 10_000}),
    }
    costs = run_interleaved(sides, repeats=bench.repeats)
    plain, exact, sampled, unbounded = costs.values()
    errors = {name: abs(exact.result[name] / plain.result[name] - 1) for name in plain.result}
    findings = [
        Finding.speed("purity step, silhouette of all", plain, exact, at_least=10.0),
        Finding.speed("purity step, silhouette of a sample of 10,000", plain, sampled, at_least=10.0),
        Finding.speed("the same, where no bound saves a product (peer as above)", plain, unbounded, at_least=10.0),
        *(Finding.at_most(f"relative difference of {name}", error, 1e-5) for name, error in errors.items()),
    ]
    return Outcome(f"purity step: {bench.n_rows:,} x 384", costs, findings)


def compare_whole(bench: Bench) -> Outcome:
    """From features to verdict."""
    data = _save(bench.folder / "whole.npz", vectors=make_features(bench.n_rows))
    sides = {
        "PCA + UMAP + HDBSCAN + scikit-learn": Side("benchmarks.image_cluster:plain_whole", {"data": data}),
        "image_cluster": Side("benchmarks.image_cluster:our_whole", {"data": data}),
    }
    costs = run_interleaved(sides, repeats=1 if bench.repeats < 4 else 2)
    plain, mine = costs.values()
    findings = [Finding.speed("features to verdict", plain, mine, at_least=1.0)]
    return Outcome(f"warm run: features cached, {bench.n_rows:,} x 384", costs, findings)


def compare_memory(bench: Bench) -> Outcome:
    """What a whole run holds, and how much of it is due to each image: four and sixteen times as many."""
    costs: dict[int, Cost] = {}
    for times in (1, 1, 4, 16):  # the first run may compile, which takes 60 MB: it is made again
        n_rows = times * (5 * bench.n_rows // 8)
        folder = bench.folder / f"memory_{n_rows}"
        write_input(folder, partial(make_features, n_rows, noise=NOISE))
        side = Side("benchmarks.image_memory:whole_run", {"folder": str(folder)})
        costs[n_rows] = run_interleaved({f"{n_rows:,} images": side}, repeats=1)[f"{n_rows:,} images"]
    named = {f"{n_rows:,} images": cost for n_rows, cost in costs.items()}
    return Outcome("memory of a whole run, features of 384 dimensions from the cache", named, memory_findings(costs))


COMPARISONS: dict[str, Callable[[Bench], Outcome]] = {
    "decode": compare_decode,
    "purity": compare_purity,
    "whole": compare_whole,
    "memory": compare_memory,
}


def _write_clusters(path: Path, n_rows: int, *, has_clusters: bool = True) -> str:
    """Features, an embedding of ten dimensions, and the labels of forty clusters and noise."""
    rng = np.random.default_rng(1)
    labels = rng.integers(-1, 40, size=n_rows)
    embedding = (rng.normal(size=(41, 10))[labels] * 6 + rng.normal(size=(n_rows, 10))).astype(np.float32)
    vectors = make_features(n_rows)
    if not has_clusters:
        vectors = rng.standard_normal(vectors.shape, np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return _save(path, vectors=vectors, embedding=embedding, labels=labels)


def _save(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, allow_pickle=False, **arrays)
    return str(path)


def _load(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def main() -> None:
    """Run the comparisons that were asked for, print them, and keep those of full size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), metavar="NAME")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep what is made as input here, for the next start")
    args = parser.parse_args()
    is_full_size = (args.images, args.rows) == (parser.get_default("images"), parser.get_default("rows"))
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            outcome = COMPARISONS[name](Bench(args.folder or Path(folder), args.images, args.rows, args.repeats))
            print_outcome(outcome)
            if is_full_size:
                PAGE.save(name, outcome)


if __name__ == "__main__":
    main()

"""image_cluster.py against the plain way: decoding with preprocessing, the purity step, and a run from cached features.

    python benchmarks/image_cluster.py                      # all, three rounds each (one of the whole run)
    python benchmarks/image_cluster.py --only purity --rows 5000

The plain sides are what one writes with OpenCV, scikit-learn, umap-learn and hdbscan in an afternoon. Every side runs
in a process of its own, rounds are interleaved, and the table goes to benchmarks/results/image_cluster.json as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe_machine, load_average, machine_lines  # noqa: E402
from benchmarks.measure import Cost, Side, Work, run_interleaved  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "image_cluster.json"

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


def make_features(n_rows: int, n_dimensions: int = 384, n_clusters: int = 40) -> np.ndarray:
    """Draw unit vectors as a vision network gives them: clusters, and a spectrum that falls."""
    rng = np.random.default_rng(0)
    spectrum = (np.arange(1, n_dimensions + 1) ** -0.5).astype(np.float32)
    means = rng.standard_normal((n_clusters, n_dimensions)) * spectrum
    noise = rng.standard_normal((n_rows, n_dimensions)) * spectrum
    vectors = (means[rng.integers(n_clusters, size=n_rows)] + 0.6 * noise).astype(np.float32)
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
    from image_parts.features import Job, prepare_ahead
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
    import common.distance_sums  # noqa: F401 - imports are set-up on both sides
    from image_parts.purity import measure_purity
    from image_parts.settings import PuritySettings

    arrays = _load(data)
    settings = PuritySettings(silhouette_sample_size=sample_size)

    def work() -> dict[str, Any]:
        found = measure_purity(arrays["vectors"], arrays["embedding"], arrays["labels"], settings).metrics
        return {
            "cosine": found["max_centroid_cosine"],
            "silhouette": found["silhouette"],
            "cross_ratio": found["max_nn_cross_ratio"],
        }

    return work


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


# --- The tables ------------------------------------------------------------------------------------------------------


def compare_decode(folder: Path, *, n_images: int, repeats: int) -> dict[str, Cost]:
    """Mixed JPEGs, one loop against threads; our second line does both polarities, which the loop does not."""
    write_jpegs(folder / "jpegs", n_images)
    arguments = {"folder": str(folder / "jpegs")}
    sides = {
        "OpenCV in a loop": Side("benchmarks.image_cluster:plain_decode", arguments),
        "image_cluster": Side("benchmarks.image_cluster:our_decode", {**arguments, "polarity_invariant": False}),
        "image_cluster, both polarities": Side(
            "benchmarks.image_cluster:our_decode", {**arguments, "polarity_invariant": True}
        ),
    }
    return run_interleaved(sides, repeats=repeats)


def compare_purity(folder: Path, *, n_rows: int, repeats: int) -> dict[str, Cost]:
    """The same three measures of the same clusters."""
    rng = np.random.default_rng(1)
    vectors = make_features(n_rows)
    labels = rng.integers(-1, 40, size=n_rows)
    embedding = (rng.normal(size=(41, 10))[labels] * 6 + rng.normal(size=(n_rows, 10))).astype(np.float32)
    data = _save(folder / "purity.npz", vectors=vectors, embedding=embedding, labels=labels)
    ours = "benchmarks.image_cluster:our_purity"
    sides = {
        "scikit-learn": Side("benchmarks.image_cluster:plain_purity", {"data": data}),
        "image_cluster, silhouette of all": Side(ours, {"data": data, "sample_size": n_rows}),
        "image_cluster, silhouette of 10,000": Side(ours, {"data": data, "sample_size": 10_000}),
    }
    return run_interleaved(sides, repeats=repeats)


def compare_whole(folder: Path, *, n_rows: int, repeats: int) -> dict[str, Cost]:
    """From features to verdict."""
    data = _save(folder / "whole.npz", vectors=make_features(n_rows))
    sides = {
        "PCA + UMAP + HDBSCAN + scikit-learn": Side("benchmarks.image_cluster:plain_whole", {"data": data}),
        "image_cluster": Side("benchmarks.image_cluster:our_whole", {"data": data}),
    }
    return run_interleaved(sides, repeats=repeats)


def print_table(title: str, costs: dict[str, Cost]) -> list[dict[str, Any]]:
    """Print one comparison, ratios to its first line, and return its rows."""
    first = next(iter(costs.values()))
    print(f"\n{title}")
    print(f"  {'':38} {'wall s':>8} {'cpu s':>8} {'MiB':>6} {'x wall':>7} {'x cpu':>7}")
    rows = []
    for name, cost in costs.items():
        wall_ratio, cpu_ratio = first.wall_s / cost.wall_s, first.cpu_s / cost.cpu_s
        print(
            f"  {name:38} {cost.wall_s:8.2f} {cost.cpu_s:8.2f} {cost.peak_mib:6.0f} {wall_ratio:7.2f} {cpu_ratio:7.2f}"
        )
        print(f"      {json.dumps(cost.result)}")
        rows.append(
            {
                "name": name,
                "wall_s": round(cost.wall_s, 3),
                "cpu_s": round(cost.cpu_s, 3),
                "peak_mib": round(cost.peak_mib),
                "wall_ratio": round(wall_ratio, 2),
                "cpu_ratio": round(cpu_ratio, 2),
                "result": cost.result,
            }
        )
    return rows


def _save(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def _load(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def main() -> None:
    """Run the comparisons that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["decode", "purity", "whole"])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    machine, load_before = describe_machine(), load_average()
    print("\n".join(machine_lines(machine)))
    tables: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.only in (None, "decode"):
            costs = compare_decode(folder, n_images=args.images, repeats=args.repeats)
            tables["decode"] = print_table(f"decode and preprocess {args.images:,} JPEGs of mixed size", costs)
        if args.only in (None, "purity"):
            costs = compare_purity(folder, n_rows=args.rows, repeats=args.repeats)
            tables["purity"] = print_table(f"purity of {args.rows:,} x 384", costs)
        if args.only in (None, "whole"):
            costs = compare_whole(folder, n_rows=args.rows, repeats=1 if args.repeats < 4 else 2)
            tables["whole"] = print_table(f"features to verdict, {args.rows:,} x 384", costs)
    if args.only is None:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        load = {"before": load_before, "after": load_average()}
        RESULTS.write_text(json.dumps({"machine": machine, "load": load, "tables": tables}, indent=2) + "\n")
        print(f"\n{RESULTS}")


if __name__ == "__main__":
    main()

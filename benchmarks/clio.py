"""What Clio's vectors cost on 100,000 facets, and how good its base clusters are on Banking77, beside k-means.

    python benchmarks/clio.py --only size --rows 25000 100000 --folder runs/bench-clio
    python benchmarks/clio.py --only growth --rows 25000 50000 100000 200000 --folder runs/bench-clio
    python benchmarks/clio.py --only growth --vectors runs/bench-clio/100000/steps/vectors.safetensors --n-clusters 0.1
    python benchmarks/clio.py --only settings                 # UMAP's settings, on parts of the train split
    python benchmarks/clio.py --only banking77                # ACC and NMI against scikit-learn's k-means
    python benchmarks/clio.py --only banking77 --self-training

Sizes are measured on made-up facets, all of them different: they are embedded by the default model, clustered with the
default settings, members and outsiders are gathered for names, and all are placed on the map, by the steps of a run and
in one process, whose time and memory are told after each step. A run that was ended goes on in the same --folder; what
was taken from there is told as such, and is not measured. Growth is that of the steps behind the embedding, which takes
each facet by itself. It is measured on the first rows of --vectors, embeddings that --only size left in its folder;
without, the same facets are given vectors at once, each the mean of its tokens' vectors in the first layer of the
default model. Sizes that an earlier run left in --folder are taken from there, and told as such. What is sought in
cells, outsiders and siblings of clusters, is held against a comparison with all rows, for 200 of the clusters.

Banking77's test part is read as dialogues of one turn whose only facet is the request itself: no model is asked
anything. The defaults of UMAP are held against others on samples of the train split, so that the test part has no say
in them. Needs banking77_test.parquet and banking77_train.parquet in CLUSTERING_DATA_DIR (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.machine import describe_machine, load_average, machine_lines
from benchmarks.measure import Cost, Side, limit_threads, peak_mib, run_side
from common.commit import Identity, write_json
from llm_parts.clio.vector_settings import VectorSettings

ROOT = Path(__file__).resolve().parents[1]
DATA_DIR = Path(os.environ.get("CLUSTERING_DATA_DIR", ROOT.parent / "shared" / "data"))
LIMIT_MIB = 4096
SEEDS = tuple(range(10))
TRAIN_PARTS, TRAIN_SEEDS = 2, (0, 1, 2)
WARM_UP_ROWS = 12_000  # as many as take the ways of very many
N_SIBLINGS, N_ASKED = 4, 200  # siblings of a cluster, and clusters by which it is judged what was found
UMAP_SETTINGS = ((10, 5), (15, 5), (15, 10), (15, 15), (30, 5))  # n_neighbors, n_components
KMEANS_REACH, UMAP_REACH = (0.62, 0.79), (0.69, 0.835)  # ACC and NMI
Result = dict[str, Any]

# What made-up facets are made of.
ACTIONS = ("write", "improve", "translate", "understand", "compare", "plan", "repair", "choose", "summarize", "check")
THINGS = (
    *("cover letter", "Python function", "holiday in the mountains", "tax return", "lentil soup", "sonnet"),
    *("database query", "lease contract", "training plan", "wedding speech", "garden bed", "car engine"),
    *("chemistry lesson", "business plan", "medical report", "chess opening", "mortgage", "school essay"),
    *("news article", "guitar solo"),
)
KINDS = ("a first version of", "a shorter version of", "an old", "a rather difficult", "somebody else's", "the usual")
REASONS = (
    *("because the last attempt failed", "for a friend who has no time", "since the deadline is near"),
    *("to save money", "out of curiosity", "for a class next week", "because the boss asked for it"),
    *("after reading about it in a magazine", "without any experience in it", "for the second time this month"),
)


# --- Sides, each in a process of its own -----------------------------------------------------------------------------


def facets_to_map(*, n_rows: int, folder: str) -> Callable[[], Result]:
    """The steps of a run from facets to the map; seconds, processor seconds and peak memory after each."""
    from llm_parts.clio.base_clusters import members_and_outsiders
    from llm_parts.clio.map2d import place_on_map
    from llm_parts.clio.run_folder import RunFolder
    from llm_parts.clio.vector_steps import VectorSteps

    facets = made_up_facets(n_rows)

    def work() -> Result:
        watch = StepWatch()
        with RunFolder(Path(folder) / str(n_rows), Identity("clio", {"rows": n_rows}, {})) as run:
            run.begin()
            kept = {path.name.partition(".")[0] for path in run.steps.glob("*.safetensors")}
            steps = VectorSteps(VectorSettings(), folder=run, seed=0, progress=True)
            vectors = steps.embed({"request": facets}, weights={"request": 1.0})
            watch.lap("embed", was_kept="vectors" in kept)
            labels, centroids = steps.cluster(vectors)
            watch.lap("cluster", was_kept="clusters" in kept)
            members_and_outsiders(vectors, labels, centroids, n_members=50, n_outsiders=50, seed=0)
            watch.lap("evidence", was_kept=False)
            run.arrays("map", lambda: {"xy": place_on_map(vectors, seed=0)}, made_from=[vectors])
            watch.lap("map", was_kept="map" in kept)
        return {"steps": watch.laps, "n_clusters": len(centroids)}

    return work


def growth(*, n_rows: int, vectors_path: str | None, n_clusters: float | str) -> Callable[[], Result]:
    """The steps of a run on given vectors, after a small run that loads and compiles what they need."""
    vectors = read_vectors(vectors_path, n_rows) if vectors_path else vectors_of_words(made_up_facets(n_rows))
    settings = VectorSettings(n_clusters=n_clusters)
    steps_on_vectors(vectors[: min(n_rows, WARM_UP_ROWS)], settings=settings, watch=StepWatch())
    return lambda: steps_on_vectors(vectors, settings=settings, watch=StepWatch())


def steps_on_vectors(vectors: np.ndarray, *, settings: VectorSettings, watch: StepWatch) -> Result:
    """Cluster, gather evidence, merge, compare and map: all that goes through rows or clusters and asks no model."""
    from llm_parts.clio.base_clusters import cluster_vectors, members_and_outsiders
    from llm_parts.clio.comparison import cophenetic_correlation
    from llm_parts.clio.confident_rows import rivals
    from llm_parts.clio.levels import cut, link, neighborhoods
    from llm_parts.clio.map2d import place_on_map
    from llm_parts.clio.nearby import nearest_others

    base = cluster_vectors(vectors, settings=settings, seed=0)
    watch.lap("cluster", was_kept=False)
    evidence = members_and_outsiders(vectors, base.labels, base.centroids, n_members=50, n_outsiders=50, seed=0)
    watch.lap("evidence", was_kept=False)
    siblings = nearest_others(base.centroids, N_SIBLINGS)
    watch.lap("siblings", was_kept=False)
    rivals(base.centroids)
    watch.lap("rivals", was_kept=False)
    neighborhoods(base.centroids, seed=0)
    watch.lap("neighbours", was_kept=False)
    merges = link(base.centroids)
    paths = np.stack([cut(merges, n_groups) for n_groups in (10, round((10 * base.n_clusters) ** 0.5))])
    watch.lap("linkage", was_kept=False)
    cophenetic_correlation(paths, base.centroids)
    watch.lap("cophenetic", was_kept=False)
    place_on_map(vectors, seed=0)
    watch.lap("map", was_kept=False)
    found = [outsiders for _, outsiders in evidence]
    return {
        "steps": watch.laps,
        "n_clusters": base.n_clusters,
        "evidence_recall": share_found(found, vectors, base.centroids, own=base.labels),
        "siblings_recall": share_found(list(siblings), base.centroids, base.centroids, own=np.arange(base.n_clusters)),
    }


def share_found(found: Sequence[np.ndarray], vectors: np.ndarray, centroids: np.ndarray, *, own: np.ndarray) -> float:
    """The share of the rows nearest to centroids, but for their own, that were found; of N_ASKED centroids."""
    asked = np.random.default_rng(0).permutation(len(centroids))[:N_ASKED].tolist()
    shares = []
    for cluster in asked:
        cosines = np.where(own == cluster, -np.inf, vectors @ centroids[cluster])
        true = np.argpartition(-cosines, len(found[cluster]) - 1)[: len(found[cluster])]
        shares.append(len(np.intersect1d(true, found[cluster])) / len(true))
    return round(float(np.mean(shares)), 4)


def read_vectors(path: str, n_rows: int) -> np.ndarray:
    """The first rows of the embeddings that --only size left; facets of any number are the first of more."""
    from safetensors.numpy import load_file

    vectors = load_file(path)["vectors"]
    if len(vectors) < n_rows:
        raise SystemExit(f"--vectors {path}: {len(vectors)} rows, and {n_rows} are asked for")
    return np.array(vectors[:n_rows])


def vectors_of_words(texts: list[str]) -> np.ndarray:
    """Unit vectors [n, 384] float32 of texts: the mean of their tokens' vectors in the first layer of the model."""
    from common.encoder import load_encoder
    from common.kmeans import unit_rows

    encoder = load_encoder(VectorSettings().embedding.sentence_model)
    words = encoder.model.get_input_embeddings().weight.detach().numpy()
    vectors = np.empty((len(texts), words.shape[1]), np.float32)
    for start in range(0, len(texts), 4096):
        tokens = encoder.tokenizer(texts[start : start + 4096], add_special_tokens=False)["input_ids"]
        vectors[start : start + len(tokens)] = [words[ids].mean(axis=0) for ids in tokens]
    return unit_rows(vectors)


class StepWatch:
    """Tells what each step took, as soon as it is over."""

    def __init__(self) -> None:
        self.laps: dict[str, Result] = {}
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self, name: str, *, was_kept: bool) -> None:
        """End a step; `was_kept`: an earlier run left its result, or a part of it."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.laps[name] = {
            "wall_s": round(wall - self._wall, 2),
            "cpu_s": round(cpu - self._cpu, 2),
            "peak_mib": round(peak_mib()),
            "was_kept": was_kept,
        }
        print(name, self.laps[name], file=sys.stderr, flush=True)
        self._wall, self._cpu = wall, cpu


def banking77(*, self_training: bool) -> Callable[[], Result]:
    """Clusters of Banking77's test part at its number of labels, over five seeds, and the peer on the same vectors."""
    from sklearn.cluster import KMeans

    from llm_parts.clio.base_clusters import cluster_vectors
    from llm_parts.clio.embedding import embed_texts
    from llm_parts.clio.measures import agreement_with_labels

    texts, labels = read_banking77()
    vectors = embed_texts(texts, settings=VectorSettings())
    k = len(set(labels))

    def ours(seed: int, **keys: Any) -> dict[str, float]:
        settings = VectorSettings(n_clusters=k, clustering={"stability_runs": 1, **keys})
        return cluster_vectors(vectors, settings=settings, seed=seed, true_labels=labels).scores

    def peer(seed: int) -> dict[str, float]:
        return agreement_with_labels(KMeans(k, n_init=10, random_state=seed).fit(vectors).labels_, labels)

    def work() -> Result:
        result: Result = {
            "rows": len(texts),
            "labels": k,
            "scikit-learn k-means": [_both(peer(seed)) for seed in SEEDS],
            "clio, embeddings": [_both(ours(seed)) for seed in SEEDS],
            "clio, UMAP": [_both(ours(seed, space="umap")) for seed in SEEDS],
        }
        if self_training:
            result["self_training"] = fine_tune(texts, labels, vectors, k)
        return result

    return work


def umap_settings() -> Callable[[], Result]:
    """Clusters of disjoint samples of Banking77's train split, each as large as the test part, by settings of UMAP."""
    from llm_parts.clio.base_clusters import cluster_vectors
    from llm_parts.clio.embedding import embed_texts

    texts, labels = read_banking77("train")
    n_rows = len(read_banking77("test")[0])
    rows = np.random.default_rng(0).permutation(len(texts))
    parts = [rows[part * n_rows : (part + 1) * n_rows] for part in range(TRAIN_PARTS)]
    vectors = [embed_texts([texts[row] for row in part], settings=VectorSettings()) for part in parts]
    truths = [[labels[row] for row in part] for part in parts]

    def work() -> Result:
        result: Result = {}
        for n_neighbors, n_components in UMAP_SETTINGS:
            keys = {"space": "umap", "umap_n_neighbors": n_neighbors, "umap_n_components": n_components}
            settings = VectorSettings(n_clusters=len(set(labels)), clustering={"stability_runs": 1, **keys})
            result[f"{n_neighbors} neighbours, {n_components} dimensions"] = [
                _both(cluster_vectors(part, settings=settings, seed=seed, true_labels=truth).scores)
                for part, truth in zip(vectors, truths, strict=True)
                for seed in TRAIN_SEEDS
            ]
        return result

    return work


def fine_tune(texts: list[str], labels: list[str], vectors: np.ndarray, k: int) -> list[dict[str, Any]]:
    """The table of a self-training with default settings, on rows that were held out."""
    from llm_parts.clio.base_clusters import cluster_vectors
    from llm_parts.clio.self_training import self_train

    settings = VectorSettings(n_clusters=k, self_training={"enabled": True})
    base = cluster_vectors(vectors, settings=settings, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        trained = self_train(
            texts, vectors, base, settings=settings, seed=0, model_dir=Path(folder) / "embedder", true_labels=labels
        )
    return trained.rows


def made_up_facets(n_rows: int) -> list[str]:
    """Sentences as facets are, all of them different, on topics of very different sizes."""
    rng, dice = np.random.default_rng(0), random.Random(0)
    sizes = rng.dirichlet(np.full(len(ACTIONS) * len(THINGS), 0.5))
    found: dict[str, None] = {}
    while len(found) < n_rows:
        for topic in rng.choice(len(sizes), n_rows - len(found), p=sizes).tolist():
            action, thing = ACTIONS[topic % len(ACTIONS)], THINGS[topic // len(ACTIONS)]
            kind, reason = dice.choice(KINDS), dice.choice(REASONS)
            found[f"The user wants to {action} {kind} {thing} of {dice.randrange(1900, 2030)} {reason}."] = None
    return list(found)


def read_banking77(part: str = "test") -> tuple[list[str], list[str]]:
    """Texts and labels of a part, test or train."""
    import pandas as pd

    frame = pd.read_parquet(DATA_DIR / f"banking77_{part}.parquet")
    return frame["text"].tolist(), frame["label"].tolist()


def _both(scores: dict[str, float]) -> list[float]:
    return [round(scores["acc"], 4), round(scores["nmi"], 4)]


# --- Report ----------------------------------------------------------------------------------------------------------


def size_lines(n_rows: int, cost: Cost) -> list[str]:
    """What each step took."""
    verdict = "fits" if cost.peak_mib < LIMIT_MIB else "does NOT fit"
    lines = [
        f"{n_rows:,} facets, {cost.result['n_clusters']} base clusters, all steps in one process: "
        f"{cost.wall_s:.0f} s, processor {cost.cpu_s:.0f} s; peak {cost.peak_mib:.0f} MiB, {verdict} 4 GB",
    ]
    for what in ("evidence", "siblings"):
        if f"{what}_recall" in cost.result:
            lines.append(f"  of the true {what} {cost.result[f'{what}_recall']:.1%} were found")
    for name, lap in cost.result["steps"].items():
        kept = "   (taken from the folder, in whole or in part)" if lap["was_kept"] else ""
        told = f"{lap['wall_s']:6.1f} s, processor {lap['cpu_s']:6.1f} s, peak until then {lap['peak_mib']} MiB"
        lines.append(f"  {name:9} {told}{kept}")
    return lines


def growth_lines(sizes: list[Result]) -> list[str]:
    """By which power of the rows the processor time of each step grows, from each size to the next."""
    rows = [f"{size['rows']:,}" for size in sizes]
    lines = [f"growth with rows ** power by step, {' to '.join(rows)}"]
    for name in sizes[-1]["steps"]:
        times = [size["steps"][name] for size in sizes]
        if len(sizes) > 1 and all(lap["cpu_s"] > 0 and not lap["was_kept"] for lap in times):
            powers = np.diff(np.log([lap["cpu_s"] for lap in times])) / np.diff(
                np.log([size["rows"] for size in sizes])
            )
            seconds = ", ".join(f"{lap['cpu_s']:.2f}" for lap in times)
            lines.append(f"  {name:9} {', '.join(f'{power:.2f}' for power in powers)}   (processor seconds {seconds})")
    return lines


def settings_lines(result: Result) -> list[str]:
    """Means over samples and seeds."""
    lines = ["UMAP's settings on samples of Banking77's train split, mean ACC / NMI"]
    for name, scores in result.items():
        acc, nmi = np.mean(scores, axis=0)
        lines.append(f"  {name:32} {acc:.4f} / {nmi:.4f}   (ACC from {min(a for a, _ in scores):.3f})")
    return lines


def banking_lines(result: Result) -> list[str]:
    """Means over the seeds, and by how much the reach was met."""
    lines = [f"Banking77 test, {result['rows']} rows, k = {result['labels']}, ACC / NMI by seed"]
    means = {}
    for name in ("scikit-learn k-means", "clio, embeddings", "clio, UMAP"):
        means[name] = np.mean(result[name], axis=0)
        each = ", ".join(f"{acc:.3f}/{nmi:.3f}" for acc, nmi in result[name])
        lines.append(f"  {name:22} {means[name][0]:.4f} / {means[name][1]:.4f}   ({each})")
    ratio = means["clio, embeddings"] / means["scikit-learn k-means"]
    lines.append(f"  clio on embeddings to scikit-learn: {ratio[0]:.3f} (ACC), {ratio[1]:.3f} (NMI)")
    for name, reach in (("clio, embeddings", KMEANS_REACH), ("clio, UMAP", UMAP_REACH)):
        met = "met" if (means[name] >= reach).all() else "MISSED"
        lines.append(f"  {name}: {reach[0]} / {reach[1]} {met}")
    lines += [f"  self-training {row}" for row in result.get("self_training", ())]
    return lines


def main() -> None:
    """Run what was asked for, print it, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("size", "growth", "settings", "banking77"), default=None)
    parser.add_argument("--rows", type=int, nargs="+", default=[25_000, 100_000])
    parser.add_argument("--folder", type=Path, help="where steps are kept, so that a run may go on; default: nowhere")
    parser.add_argument("--vectors", type=Path, help="growth: embeddings to take, a steps/vectors.safetensors")
    parser.add_argument("--n-clusters", default="auto", help="growth: a number, a share of the rows below 1, or auto")
    parser.add_argument("--self-training", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    limit_threads(arguments.threads)
    machine = describe_machine()
    say("\n".join([*machine_lines(machine), f"threads {arguments.threads}, load {load_average()}", ""]))
    results: Result = {"machine": machine, "load": load_average()}
    if arguments.only in (None, "size"):
        with tempfile.TemporaryDirectory() as nowhere:
            results["sizes"] = measure_sizes(sorted(arguments.rows), arguments.folder or Path(nowhere))
    if arguments.only == "growth":
        results["growth"] = measure_growth(
            sorted(arguments.rows), arguments.folder, vectors=arguments.vectors, n_clusters=arguments.n_clusters
        )
    if arguments.only in (None, "settings"):
        results["umap_settings"] = run_side(Side("benchmarks.clio:umap_settings")).result
        say("\n".join(settings_lines(results["umap_settings"])))
    if arguments.only in (None, "banking77"):
        cost = run_side(Side("benchmarks.clio:banking77", {"self_training": arguments.self_training}))
        results["banking77"] = cost.result
        say("\n".join(banking_lines(cost.result)))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2, default=float) + "\n", encoding="utf-8")


def measure_sizes(rows: list[int], folder: Path) -> list[Result]:
    """Each number of rows in a process of its own."""
    sizes = []
    for n_rows in rows:
        cost = run_side(Side("benchmarks.clio:facets_to_map", {"n_rows": n_rows, "folder": str(folder)}))
        sizes.append({"rows": n_rows, "peak_mib": cost.peak_mib, "cpu_s": cost.cpu_s, **cost.result})
        say("\n".join(size_lines(n_rows, cost)))
    say("\n".join(growth_lines(sizes)))
    return sizes


def measure_growth(rows: list[int], folder: Path | None, *, vectors: Path | None, n_clusters: str) -> list[Result]:
    """Each number of rows in a process of its own, but for those that an earlier run left in the folder."""
    sizes = []
    for n_rows in rows:
        name = "-".join(["growth", str(n_rows), n_clusters, "embedded" if vectors else "words"])
        kept = folder / f"{name}.json" if folder else None
        if kept and kept.exists():
            sizes.append(json.loads(kept.read_text(encoding="utf-8")))
            say(f"{n_rows:,} facets: measured before, {kept}")
            continue
        wanted = n_clusters if n_clusters == "auto" else float(n_clusters)
        path = str(vectors.resolve()) if vectors else None
        arguments = {"n_rows": n_rows, "vectors_path": path, "n_clusters": wanted}
        cost = run_side(Side("benchmarks.clio:growth", arguments))
        sizes.append({"rows": n_rows, "peak_mib": cost.peak_mib, "cpu_s": cost.cpu_s, **cost.result})
        say("\n".join(size_lines(n_rows, cost)))
        if kept:
            write_json(kept, sizes[-1])
    say("\n".join(growth_lines(sizes)))
    return sizes


def say(text: str) -> None:
    """Print at once: a side may take minutes."""
    print(text, flush=True)


if __name__ == "__main__":
    main()

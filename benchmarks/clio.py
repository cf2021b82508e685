"""What Clio's vectors cost on 100,000 facets, and how good its base clusters are on Banking77, beside k-means.

    python benchmarks/clio.py --only size --rows 100000       # clusters, evidence for names, map: time and memory
    python benchmarks/clio.py --only banking77                # ACC and NMI against scikit-learn's k-means
    python benchmarks/clio.py --only banking77 --self-training

Sizes are measured on made-up unit vectors of 384 dimensions around 200 topics, since embedding 100,000 texts takes many
minutes on one core and its memory does not grow with them: it is measured on 2,000 texts, and as a rate. Banking77's
test part is read as dialogues of one turn whose only facet is the request itself: no model is asked anything. Needs
banking77_test.parquet in CLUSTERING_DATA_DIR (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.machine import describe_machine, load_average, machine_lines
from benchmarks.measure import Cost, Side, limit_threads, run_side
from llm_parts.clio.vector_settings import VectorSettings

ROOT = Path(__file__).resolve().parents[1]
DATA_DIR = Path(os.environ.get("CLUSTERING_DATA_DIR", ROOT.parent / "shared" / "data"))
N_TOPICS, DIMENSION = 200, 384
N_EMBEDDED = 2000
SEEDS = (0, 1, 2, 3, 4)
STEPS = ("cluster", "evidence", "map")
KMEANS_REACH, UMAP_REACH = (0.62, 0.79), (0.69, 0.835)  # ACC and NMI
Result = dict[str, Any]


# --- Sides, each in a process of its own -----------------------------------------------------------------------------


def steps_of(*, n_rows: int, steps: list[str]) -> Callable[[], Result]:
    """Steps of a run on made-up facets: `cluster`, `evidence` (members and outsiders of all clusters), `map`."""
    from llm_parts.clio.base_clusters import cluster_vectors, members_and_outsiders
    from llm_parts.clio.map2d import place_on_map

    vectors, settings = made_up_vectors(n_rows), VectorSettings()

    def work() -> Result:
        result: Result = {}
        started = time.perf_counter()
        if "cluster" in steps:
            base = cluster_vectors(vectors, settings=settings, seed=0)
            result |= {"cluster_s": time.perf_counter() - started, "n_clusters": base.n_clusters, **base.scores}
        if "evidence" in steps:
            started = time.perf_counter()
            members_and_outsiders(vectors, base.labels, base.centroids, n_members=50, n_outsiders=50, seed=0)
            result["evidence_s"] = time.perf_counter() - started
        if "map" in steps:
            started = time.perf_counter()
            place_on_map(vectors, seed=0)
            result["map_s"] = time.perf_counter() - started
        return result

    return work


def embedding() -> Callable[[], Result]:
    """Embed short texts by the default model."""
    from llm_parts.clio.embedding import embed_texts

    texts = read_banking77()[0][:N_EMBEDDED]
    settings = VectorSettings()
    embed_texts(texts[:8], settings=settings)

    def work() -> Result:
        started = time.perf_counter()
        embed_texts(texts, settings=settings)
        return {"texts": len(texts), "texts_per_s": len(texts) / (time.perf_counter() - started)}

    return work


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


def made_up_vectors(n_rows: int) -> np.ndarray:
    """Unit vectors [n, 384] float32 around topics of very different sizes, as dialogues have."""
    rng = np.random.default_rng(0)
    topics = rng.normal(size=(N_TOPICS, DIMENSION)).astype(np.float32)
    sizes = rng.dirichlet(np.full(N_TOPICS, 0.7))
    vectors = rng.standard_normal((n_rows, DIMENSION), dtype=np.float32)
    vectors += topics[rng.choice(N_TOPICS, n_rows, p=sizes)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def read_banking77() -> tuple[list[str], list[str]]:
    """Texts and labels of the test part."""
    import pandas as pd

    frame = pd.read_parquet(DATA_DIR / "banking77_test.parquet")
    return frame["text"].tolist(), frame["label"].tolist()


def _both(scores: dict[str, float]) -> list[float]:
    return [round(scores["acc"], 4), round(scores["nmi"], 4)]


# --- Report ----------------------------------------------------------------------------------------------------------


def size_lines(n_rows: int, steps: list[str], cost: Cost) -> list[str]:
    """What the steps took."""
    times = ", ".join(f"{name} {cost.result[f'{name}_s']:.0f} s" for name in steps)
    verdict = "fits" if cost.peak_mib < 4096 else "does NOT fit"
    return [
        f"{n_rows:,} facets, {', '.join(steps)} in one process: {times}; processor {cost.cpu_s:.0f} s",
        f"peak memory of the process {cost.peak_mib:.0f} MiB: {verdict} 4 GB "
        f"({cost.set_up_mib:.0f} MiB of it before the first step: libraries and the vectors)",
    ]


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
    parser.add_argument("--only", choices=("size", "banking77"), default=None)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--steps", nargs="+", choices=(*STEPS, "embed"), default=[*STEPS, "embed"])
    parser.add_argument("--self-training", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    limit_threads(arguments.threads)
    machine = describe_machine()
    say("\n".join([*machine_lines(machine), f"threads {arguments.threads}, load {load_average()}", ""]))
    results: Result = {"machine": machine, "load": load_average()}
    if arguments.only != "banking77":
        results |= measure_size(arguments.rows, arguments.steps)
    if arguments.only != "size":
        cost = run_side(Side("benchmarks.clio:banking77", {"self_training": arguments.self_training}))
        results["banking77"] = cost.result
        say("\n".join(banking_lines(cost.result)))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2, default=float) + "\n", encoding="utf-8")


def measure_size(n_rows: int, steps: list[str]) -> Result:
    """The steps in one process, and the embedding of some texts in another."""
    results: Result = {}
    together = [step for step in STEPS if step in steps]
    if together:
        cost = run_side(Side("benchmarks.clio:steps_of", {"n_rows": n_rows, "steps": together}))
        results["size"] = {"rows": n_rows, "peak_mib": cost.peak_mib, "cpu_s": cost.cpu_s, **cost.result}
        say("\n".join(size_lines(n_rows, together, cost)))
    if "embed" in steps:
        cost = run_side(Side("benchmarks.clio:embedding"))
        results["embedding"] = {"peak_mib": cost.peak_mib, **cost.result}
        minutes = n_rows / cost.result["texts_per_s"] / 60
        say(
            f"embedding: {cost.result['texts_per_s']:.0f} facets/s, so {n_rows:,} take {minutes:.0f} minutes; "
            f"peak memory {cost.peak_mib:.0f} MiB"
        )
    return results


def say(text: str) -> None:
    """Print at once: a side may take minutes."""
    print(text, flush=True)


if __name__ == "__main__":
    main()

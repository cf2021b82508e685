"""What llm_cluster reaches on real bank requests, with a scripted model that knows the labels, beside k-means.

    python benchmarks/llm_cluster.py --rows 1000 --out benchmarks/results/llm_cluster.json

A server on 127.0.0.1 plays the model: right always; or wrong in 10% of its judgements, with 10% malformed answers, 5%
429 and 2% dropped connections. So the table says what the machinery makes of a model, not how good a model is. Needs
banking77_test.parquet and banking77_train.parquet in CLUSTERING_DATA_DIR (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import pandas as pd
from llm_brain import TruthBrain
from llm_servers import LlmServer, rates
from machine import describe_machine, load_average, machine_lines

from llm_parts.baseline import compare_with_baseline
from llm_parts.client import LlmClient
from llm_parts.clusterer import Clusterer
from llm_parts.options import ClusterOptions
from llm_parts.pipeline import numbered_batches
from llm_parts.prompts import as_data
from llm_parts.registry import ClusterRegistry
from llm_parts.requests import read_requests
from llm_parts.settings import LlmSettings
from llm_parts.shortlist import ModelEmbedder, TextVectors

ROOT = Path(__file__).resolve().parents[1]
DATA_DIR = Path(os.environ.get("CLUSTERING_DATA_DIR", ROOT.parent / "shared" / "data"))
FAULTS = {"malformed": 0.10, "rate_limited": 0.05, "dropped": 0.02}


class Kept:
    """The embedder of all runs, so that each text is embedded once and calls are measured without it."""

    def __init__(self) -> None:
        self.name = ClusterOptions().embedder
        self._vectors = TextVectors(ModelEmbedder(self.name))

    def encode(self, texts: Any) -> np.ndarray:
        """Unit vectors of the texts."""
        return self._vectors.of(list(texts))


def cluster(
    frame: pd.DataFrame, llm: LlmSettings, embedder: Kept, registry: ClusterRegistry | None = None
) -> dict[str, Any]:
    """One run over all rows: scores, calls and tokens."""
    options = ClusterOptions()
    columns = {name: frame[name].tolist() for name in ("text", "label")}
    table = read_requests(
        columns, text_column="text", label_column="label", batch_id="bench", max_chars=options.max_request_chars
    )
    vectors = TextVectors(embedder)
    vectors.of([request.text for request in table.requests if not request.is_empty])
    started, cpu_started = time.perf_counter(), time.process_time()
    with LlmClient(llm) as client:
        clusterer = Clusterer(client, registry or ClusterRegistry(), options=options, vectors=vectors, batch_id="bench")
        for _ in clusterer.process_all(numbered_batches(table.requests, options.batch_size)):
            pass
        clusterer.finish()
        spent = client.ledger.summary()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    assignments = [clusterer.assignments[request.position] for request in table.requests]
    scores = compare_with_baseline(assignments, table.requests, vectors)
    n = len(frame)
    return {
        "coverage": round(100 * sum(entry.cluster_id is not None for entry in assignments) / n, 1),
        "clusters": len({entry.cluster_id for entry in assignments} - {None}),
        "true_clusters": frame["label"].nunique(),
        "ari": round(scores["ours"]["ari"], 3),
        "nmi": round(scores["ours"]["nmi"], 3),
        "kmeans_ari": round(scores["kmeans_same_k"]["ari"], 3),
        "kmeans_nmi": round(scores["kmeans_same_k"]["nmi"], 3),
        "calls_per_request": round(spent["calls"] / n, 2),
        "tokens_in_per_request": round(spent["tokens_in"] / n),
        "failures": spent["failures"],
        "steps": {name: step["calls"] for name, step in spent["steps"].items()},
        "tokens_in_by_step": {name: step["tokens_in"] for name, step in spent["steps"].items()},
        "seconds": round(seconds, 1),
        # Of this process, the server that plays the model and the embedding of cluster names included.
        "cpu_ms_per_call": round(1000 * cpu_seconds / max(1, spent["calls"] + spent["cached"]), 2),
    }


def quality(frame: pd.DataFrame, embedder: Kept) -> dict[str, Any]:
    """The true brain, the faulty brain and no model at all."""
    labels = dict(zip(frame["text"], frame["label"], strict=True))
    results = {}
    for name, wrong, faults in (("right always", 0.0, None), ("with faults", 0.1, rates(**FAULTS))):
        with LlmServer(TruthBrain(labels, wrong=wrong), faults=faults) as server:
            results[name] = cluster(frame, server.settings("openai"), embedder)
    results["extractive, no model"] = cluster(frame, LlmSettings(provider="extractive"), embedder)
    return results


def flatness(frame: pd.DataFrame, train: pd.DataFrame, embedder: Kept) -> dict[str, Any]:
    """Prompt tokens a request, of all steps together and of each, while the registry grows from 20 to 500 clusters.

    The requests stay the same, those of 20 intents, whose clusters are always known; what is added are clusters of
    other intents. Four groups of 20 intents take their turns, and the figures are of all their requests together.
    """
    names = sorted(frame["label"].unique())
    groups = [names[:20], names[20:40], names[40:60], names[-20:]]
    rows = [frame[frame["label"].isin(group)] for group in groups]
    n_requests = sum(map(len, rows))
    found: dict[str, Any] = {}
    for n_clusters in (20, 100, 500):
        steps: Counter[str] = Counter()
        for group, asked in zip(groups, rows, strict=True):
            registry = grown_registry(group, train, n_clusters=n_clusters)
            with LlmServer(TruthBrain(dict(zip(asked["text"], asked["label"], strict=True)))) as server:
                steps.update(cluster(asked, server.settings("openai"), embedder, registry)["tokens_in_by_step"])
        by_step = {name: round(tokens / n_requests, 1) for name, tokens in steps.items()}
        found[str(n_clusters)] = {"tokens_in_per_request": round(steps.total() / n_requests), "by_step": by_step}
    return found


def grown_registry(names: Sequence[str], train: pd.DataFrame, *, n_clusters: int) -> ClusterRegistry:
    """A registry of the clusters of these intents and of others, up to `n_clusters`.

    The other intents are fewer than the clusters made of them, so most have near twins, which no registry that merges
    would hold: it is harder to find the right ones among them than among 500 intents.
    """
    registry = ClusterRegistry()
    for name in names:
        cluster_id = registry.add(name.replace("_", " "), criteria=f"label: {name}").cluster_id
        samples = train.loc[train["label"] == name, "text"].head(5).tolist()
        registry.add_requests(cluster_id, n=5, samples=samples, batch_id="earlier")
    others = train[~train["label"].isin(names)]
    wanted = round(sum(len(as_data(record.to_prompt())) for record in registry.live()) / len(names))
    for number in range(n_clusters - len(names)):
        part = others.iloc[number * len(others) // 480 :].head(3)
        name, criteria = f"{part.iloc[0]['text'][:20]} {number}", f"label: {number} {part.iloc[0]['label']}"
        # As long in a prompt as the true ones are on the average: tokens grow only where more clusters are shown.
        excess = len(as_data(registry.copy().add(name, criteria=criteria).to_prompt())) - wanted
        criteria = criteria[: len(criteria) - excess] if excess > 0 else criteria.ljust(len(criteria) - excess, ".")
        cluster_id = registry.add(name, criteria=criteria).cluster_id
        registry.add_requests(cluster_id, n=3, samples=part["text"].tolist(), batch_id="earlier")
    return registry


def main() -> None:
    """Run all, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    frame = pd.read_parquet(DATA_DIR / "banking77_test.parquet").sample(
        arguments.rows, random_state=0, ignore_index=True
    )
    train = pd.read_parquet(DATA_DIR / "banking77_train.parquet")
    embedder = Kept()
    machine = describe_machine()
    print("\n".join(machine_lines(machine)), f"\nload {load_average()}\n")
    results: dict[str, Any] = {"machine": machine, "rows": len(frame), "quality": quality(frame, embedder)}
    for name, row in results["quality"].items():
        print(
            f"{name}: coverage {row['coverage']}%, ARI {row['ari']} (k-means {row['kmeans_ari']}, ratio "
            f"{row['ari'] / row['kmeans_ari']:.2f}), {row['clusters']} of {row['true_clusters']} clusters, "
            f"{row['calls_per_request']} calls and {row['tokens_in_per_request']} tokens a request, "
            f"{row['cpu_ms_per_call']} ms of CPU a call, failures {row['failures']}"
        )
    results["tokens_in_by_known_clusters"] = flatness(frame, train, embedder)
    base = results["tokens_in_by_known_clusters"]["20"]["tokens_in_per_request"]
    for n_clusters, row in results["tokens_in_by_known_clusters"].items():
        tokens = row["tokens_in_per_request"]
        print(f"{n_clusters} clusters: {tokens} prompt tokens a request ({tokens / base - 1:+.1%}), {row['by_step']}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""How busy a whole run of llm_cluster.py keeps a server, and how much processor time it takes a call.

    python benchmarks/llm_whole_run.py [--rows 1000] [--out benchmarks/results/llm_whole_run.json]

The command runs as a user runs it, on real bank requests, against a scripted model behind HTTP in a process of its own:
once a model that takes 200 ms at a concurrency of 10, for the calls in flight from the first to the last; once a model
that answers at once, for the processor time a call takes (with the embedder `words`, so that the time is not that of
an embedding model). The peer is a pool of ten threads that does nothing but call the official client: what it reaches
is what this machine has to give. Needs banking77_test.parquet in CLUSTERING_DATA_DIR (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pandas as pd  # noqa: E402
import yaml  # noqa: E402
from llm_brain import TruthBrain  # noqa: E402
from llm_servers import KEY, LlmServer  # noqa: E402

from benchmarks.machine import describe_machine, load_average, machine_lines  # noqa: E402

DATA_DIR = Path(os.environ.get("CLUSTERING_DATA_DIR", ROOT.parent / "shared" / "data"))
RUNNER = "import resource, sys, llm_cluster; code = llm_cluster.main(sys.argv[1:]); r = resource.getrusage(0); " \
    "print(r.ru_utime + r.ru_stime); sys.exit(code)"  # fmt: skip


def serve(labels: dict[str, str], delay_s: float, connection: Any) -> None:
    """The scripted model; says its address, and how busy it was when asked."""
    with LlmServer(TruthBrain(labels), delay_s=delay_s) as server:
        connection.send(server.url("openai"))
        connection.recv()
        busy = {"mean": round(server.mean_in_flight, 2), "most": server.max_in_flight, "calls": len(server.calls)}
        connection.send(busy)


def run(frame: pd.DataFrame, *, delay_s: float, embedder: str | None) -> dict[str, Any]:
    """One run of the command: calls in flight, seconds, processor time, and what came of it."""
    labels = dict(zip(frame["text"], frame["label"], strict=True))
    ours, theirs = multiprocessing.Pipe()
    model = multiprocessing.get_context("spawn").Process(target=serve, args=(labels, delay_s, theirs))
    model.start()
    with tempfile.TemporaryDirectory() as folder:
        frame.to_csv(f"{folder}/requests.csv", index=False)
        llm = {"provider": "openai", "model": "m", "url": ours.recv(), "concurrency": 10}
        own: dict[str, Any] = {"input": f"{folder}/requests.csv", "output_dir": f"{folder}/out"}
        own |= {"label_column": "label", "progress": False, **({"embedder": embedder} if embedder else {})}
        Path(f"{folder}/config.yaml").write_text(yaml.safe_dump({"llm": llm, "llm_cluster": own}))
        started = time.perf_counter()
        command = [sys.executable, "-c", RUNNER, "--config", f"{folder}/config.yaml"]
        ended = subprocess.run(
            command, cwd=ROOT, check=True, capture_output=True, text=True, env={**os.environ, "OPENAI_API_KEY": KEY}
        )
        seconds = time.perf_counter() - started
        report = json.loads(Path(f"{folder}/out/reports/batch-001.json").read_text())
    ours.send("done")
    busy = ours.recv()
    model.join()
    cpu_seconds = float(ended.stdout.splitlines()[-1])
    return {
        "in_flight": busy,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "cpu_ms_per_call": round(1000 * cpu_seconds / busy["calls"], 2),
        "coverage": report["coverage"],
        "ari": round(report["scores"]["ours"]["ari"], 3),
        "clusters": report["n_clusters_used"],
        "calls": {name: step["calls"] for name, step in report["steps"].items()},
    }


def peer(*, n_calls: int = 500) -> dict[str, Any]:
    """Calls in flight of ten threads that call the official client and do nothing else."""
    import openai

    ours, theirs = multiprocessing.Pipe()
    model = multiprocessing.get_context("spawn").Process(target=serve, args=({"": ""}, 0.2, theirs))
    model.start()
    client = openai.OpenAI(api_key=KEY, base_url=ours.recv(), max_retries=0)
    prompt = 'schema: judge\n<requests>[{"request_id":"1","text":"hi"}]</requests><clusters>[]</clusters>' + "x" * 3000

    def call(_: int) -> None:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": prompt}])

    call(0)
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(call, range(n_calls)))
    ours.send("done")
    busy = ours.recv()
    model.join()
    return {"in_flight": busy}


def main() -> None:
    """Run all, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    frame = pd.read_parquet(DATA_DIR / "banking77_test.parquet")
    frame = frame.sample(arguments.rows, random_state=0, ignore_index=True)
    machine = describe_machine()
    print("\n".join(machine_lines(machine)), f"\nload {load_average()}\n")
    results: dict[str, Any] = {"machine": machine, "load_before": load_average(), "rows": len(frame)}
    todo = {
        "200 ms a call": lambda: run(frame, delay_s=0.2, embedder=None),
        "peer, 200 ms a call": peer,
        "at once, embedder words": lambda: run(frame, delay_s=0.0, embedder="words"),
    }
    for name, measure in todo.items():
        results[name] = measure()
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    results["load_after"] = load_average()
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

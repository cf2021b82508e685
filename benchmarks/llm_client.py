"""What our policy costs a call (cache, budget, log, validation), beside the official client alone, and how busy it
keeps a server.

    python benchmarks/llm_client.py [--calls 200]

Against servers on 127.0.0.1 that speak each wire format. The cost is processor time of the calling thread, so that the
server, which shares the processor here, does not count. Results go to benchmarks/results/llm_client.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from llm_servers import LlmServer  # noqa: E402

from benchmarks.machine import describe_machine, load_average, machine_lines  # noqa: E402
from llm_parts.client import LlmClient, LlmRequest, get_llm_provider  # noqa: E402
from llm_parts.schemas import JudgeAnswer, json_schema  # noqa: E402
from llm_parts.wires.base import WireCall  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "llm_client.json"
PROVIDERS = ("openai", "anthropic", "ollama", "triton")
CLUSTER_IDS = [f"c-{number}" for number in range(12)]
DECISION = {"request_id": "r1", "decision": "assign", "cluster_id": "c-1", "confidence": 0.9, "rationale": "it fits"}


def brain(name: str, messages: list[dict[str, str]], schema: Any) -> dict[str, Any]:
    """A judge who is sure."""
    return {"decisions": [DECISION]}


def question(number: int) -> LlmRequest[JudgeAnswer]:
    """A judge's prompt of usual length, 5 KB."""
    messages = [
        {"role": "system", "content": "You decide which cluster a request belongs to. " * 20},
        {"role": "user", "content": f"request {number}: " + "words and words " * 250},
    ]
    return LlmRequest(messages, JudgeAnswer, "judge", step="judge", choices={"cluster_id": CLUSTER_IDS})


def median_ms(work: Callable[[int], Any], n_calls: int) -> float:
    """Median processor time of this thread over calls of `work`, in milliseconds."""
    seconds = []
    for number in range(n_calls):
        started = time.thread_time()
        work(number)
        seconds.append(time.thread_time() - started)
    return 1000 * statistics.median(seconds)


def overhead(provider: str, n_calls: int) -> dict[str, float]:
    """Milliseconds a call takes with our policy, by the wire alone, and from the cache."""
    with LlmServer(brain) as server, tempfile.TemporaryDirectory() as folder:
        settings = server.settings(provider, cache_path=f"{folder}/cache.sqlite")
        wire: Any = get_llm_provider(provider, settings)
        schema = json_schema(JudgeAnswer, schema_name="judge", choices={"cluster_id": CLUSTER_IDS})
        call = WireCall(question(0).messages, schema, "judge", temperature=0.0)
        with LlmClient(settings, prompts_path=Path(folder) / "prompts.jsonl") as client:
            client.answer(question(-1))
            wire.send(call, wire.capabilities)
            alone = median_ms(lambda number: wire.send(call, wire.capabilities), n_calls)
            whole = median_ms(lambda number: client.answer(question(number)), n_calls)
            cached = median_ms(lambda number: client.answer(question(number)), n_calls)
    ours = whole - alone
    return {"wire_ms": alone, "whole_ms": whole, "ours_ms": ours, "ratio": whole / alone, "cached_ms": cached}


def in_flight(provider: str, n_calls: int) -> dict[str, float]:
    """Calls in flight at a concurrency of 10 against a server that takes 200 ms."""
    with LlmServer(brain, delay_s=0.2) as server:
        with LlmClient(server.settings(provider, concurrency=10)) as client:
            client.preflight()
            server.forget()
            client.ask_many([question(number) for number in range(n_calls)])
        return {"mean": server.mean_in_flight, "max": server.max_in_flight}


def main() -> None:
    """Measure all providers, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200)
    n_calls = parser.parse_args().calls
    results: dict[str, Any] = {"machine": describe_machine(), "load_before": load_average(), "calls": n_calls}
    print("\n".join(machine_lines(results["machine"])))
    titles = ("wire ms", "whole ms", "ours ms", "cached ms", "in flight", "most")
    print(
        f"{'provider':<10} {titles[0]:>8} {titles[1]:>9} {titles[2]:>8} {titles[3]:>10} {titles[4]:>10} {titles[5]:>5}"
    )
    for provider in PROVIDERS:
        cost, busy = overhead(provider, n_calls), in_flight(provider, n_calls)
        results[provider] = {name: round(value, 3) for name, value in cost.items()} | {"in_flight": busy}
        print(
            f"{provider:<10} {cost['wire_ms']:8.2f} {cost['whole_ms']:9.2f} {cost['ours_ms']:8.2f} "
            f"{cost['cached_ms']:10.2f} {busy['mean']:10.2f} {busy['max']:5d}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

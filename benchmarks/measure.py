"""Run each side of a comparison in a process of its own and say what it cost: seconds, processor seconds, memory.

A side is a function that sets up and returns the work that is timed:

    def predict(*, vectors_path, ...):
        vectors = np.load(vectors_path)          # set-up: imports and what the comparison leaves apart
        return lambda: {"labels": ...}           # work: timed; returns a small dict

Peak memory is that of the whole process, with imports and set-up.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

Work = Callable[[], dict[str, Any]]

# How the libraries of both sides are told; Arrow's pool follows the first.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True)
class Side:
    """A function by its name, "module:function", and the arguments that it sets up with."""

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What one run of a side cost, or the medians of several runs."""

    wall_s: float
    cpu_s: float  # user and system seconds of all threads: steadier than wall on a busy machine
    peak_mib: float
    set_up_mib: float  # resident before the work began: libraries, mostly
    n_runs: int
    result: dict[str, Any]


def limit_threads(n_threads: int) -> None:
    """Give all sides that are run from now on so many threads; without this each library takes what it takes."""
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(n_threads)))


def n_threads() -> str:
    """How many threads the sides have, in words."""
    return os.environ.get(_THREAD_VARIABLES[0], "as many as each library takes")


def run_side(side: Side) -> Cost:
    """Run one side in a fresh process; raises RuntimeError with its output where it fails."""
    os.sync()  # so that no side waits for what another left to be written
    job = json.dumps({"function": side.function, "arguments": side.arguments}, default=str)
    command = [sys.executable, "-m", "benchmarks.measure", "--job"]
    process = subprocess.run(command, input=job, capture_output=True, text=True, cwd=ROOT, check=False)
    if process.returncode:
        raise RuntimeError(f"{side.function} failed:\n{process.stdout}\n{process.stderr}")
    return Cost(**json.loads(process.stdout.splitlines()[-1]), n_runs=1)


def run_interleaved(sides: Mapping[str, Side], *, repeats: int) -> dict[str, Cost]:
    """Run all sides in turn, `repeats` times, so that a busy moment meets each of them; returns medians by name."""
    runs: dict[str, list[Cost]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name, side in sides.items():
            cost = run_side(side)
            runs[name].append(cost)
            spent = f"{cost.wall_s:.2f} s, cpu {cost.cpu_s:.2f} s, {cost.peak_mib:.0f} MiB"
            print(f"  {repeat + 1}/{repeats} {name}: {spent}", file=sys.stderr, flush=True)
    return {name: _medians(costs) for name, costs in runs.items()}


def _medians(costs: list[Cost]) -> Cost:
    def median(name: str) -> float:
        return statistics.median(getattr(cost, name) for cost in costs)

    return Cost(
        median("wall_s"),
        median("cpu_s"),
        max(cost.peak_mib for cost in costs),
        median("set_up_mib"),
        len(costs),
        costs[0].result,
    )


# --- In the child ----------------------------------------------------------------------------------------------------


def _run_job(job: dict[str, Any]) -> dict[str, Any]:
    module, _, function = job["function"].partition(":")
    work: Work = getattr(import_module(module), function)(**job["arguments"])
    set_up_mib = peak_mib()
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        # A work that had the peak measured anew in its midst tells the largest itself.
        "peak_mib": max(peak_mib(), result.get("peak_mib", 0.0)),
        "set_up_mib": set_up_mib,
        "result": result,
    }


def peak_mib() -> float:
    """The largest resident size of this process so far."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    # Not ru_maxrss: on Linux it starts from the size of the process that started this one.
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__" and sys.argv[1:] == ["--job"]:
    print(json.dumps(_run_job(json.load(sys.stdin)), default=float))

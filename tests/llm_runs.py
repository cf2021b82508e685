"""One run of llm_cluster.py in a process of its own that can be killed; preloaded, so that twenty of them are quick."""

from __future__ import annotations

import multiprocessing
from typing import Any

import llm_cluster


def run_script(arguments: list[str], connection: Any) -> None:
    """Run the command and send its exit code."""
    connection.send(llm_cluster.main(arguments))


# What a run imports on its way; the openai client alone takes most of a second.
_PRELOADED = (
    "llm_runs", "llm_cluster", "llm_parts.pipeline", "llm_parts.report", "common.tables", "common.kmeans", "omegaconf",
    "pandas", "pyarrow.parquet", "scipy.optimize", "tenacity", "openai", "openai.resources.chat", "httpcore2",
    "llm_parts.wires.openai_wire",
)  # fmt: skip


def start_run(arguments: list[str]) -> tuple[Any, Any]:
    """Start the command; returns the process and the end of a pipe on which its exit code arrives."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_script, args=(arguments, sender))
    process.start()
    sender.close()
    return process, receiver

"""What the benchmarks ran on: processor, instruction sets, memory, versions, and how busy the machine was."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
_PACKAGES = (
    "numpy",
    "pandas",
    "pyarrow",
    "scikit-learn",
    "torch",
    "transformers",
    "sentence-transformers",
)


def describe_machine() -> dict[str, Any]:
    """The facts that a reader needs to compare numbers with those of another machine."""
    cpuinfo = _read("/proc/cpuinfo")
    return {
        "processor": _field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": [flag for flag in _FLAGS if flag in set(_field(cpuinfo, "flags").split())],
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def load_average() -> float:
    """Processes that wanted a core in the last minute; above the number of cores, seconds are not to be trusted."""
    return round(os.getloadavg()[0], 1)


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """The description in lines of text."""
    flags, packages = machine["instructions"], machine["packages"]
    return [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}",
        f"instruction sets: {', '.join(flags) or 'none of ' + ', '.join(_FLAGS)}"
        + ("" if "amx_bf16" in flags else " (no AMX)"),
        f"Python {machine['python']}, " + ", ".join(f"{name} {version}" for name, version in packages.items()),
    ]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # not Linux: the description is shorter


def _field(cpuinfo: str, name: str) -> str:
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    print("\n".join(machine_lines(describe_machine())))

"""What this machine can compute with: cuML, torch on a GPU, or the CPU; and with which device and dtype.

    backend = choose_backend("auto")     # Backend(name="cpu", device="cpu", reason="...")
    device = choose_device("auto")       # "cuda" or "cpu"
    dtype = choose_dtype("auto", device=device)

An import proves nothing: cuML imports cleanly on a machine without a driver and fails at the first `fit`, so both GPU
libraries are asked for a tiny result, once per process.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from common.config import UserError

logger = logging.getLogger(__name__)

BackendName = Literal["cuml", "torch_cuda", "cpu"]

# Where Linux lists the instruction sets of the processor.
CPUINFO_PATH = Path("/proc/cpuinfo")
# Where Linux lists devices, and how those of GPUs begin: NVIDIA's, also on Jetson boards, AMD's, and WSL's.
DEVICES_FOLDER = Path("/dev")
GPU_DEVICES = ("nvidia", "nvhost", "nvgpu", "nvmap", "kfd", "dxg")


@dataclass(frozen=True)
class Backend:
    """Where the numerics run, and why there."""

    name: BackendName
    device: str  # what torch calls it: "cuda" or "cpu"
    reason: str

    @property
    def uses_cuml(self) -> bool:
        """Whether cuML does the reductions and clusterings."""
        return self.name == "cuml"


@dataclass(frozen=True)
class ProbeResult:
    """Whether a tiny computation worked, and what was seen."""

    works: bool
    reason: str


CPU = Backend("cpu", "cpu", "chosen by the caller")


def choose_backend(requested: str = "auto") -> Backend:
    """Pick cuML if it computes, else torch on a GPU, else the CPU, and log the choice with its reason.

    `requested` is "auto", "cuda" or "cpu"; "cuda" without a usable GPU becomes "cpu" with a warning.
    Raises UserError for any other value.
    """
    if requested not in ("auto", "cuda", "cpu"):
        raise UserError(f'backend "{requested}" is unknown; use auto, cuda or cpu')
    backend = Backend("cpu", "cpu", "backend: cpu") if requested == "cpu" else _best_backend()
    if requested == "cuda" and backend.name == "cpu":
        logger.warning("backend: cuda was asked for but no GPU is usable, so the CPU is used (%s)", backend.reason)
    else:
        logger.info("backend: %s (%s)", backend.name, backend.reason)
    if backend.name == "torch_cuda":
        logger.info("UMAP and HDBSCAN run on the CPU: only cuML has them for the GPU")
    return backend


def choose_device(requested: str = "auto") -> str:
    """Resolve a torch device name: "auto" is "cuda" where a GPU computes, else "cpu".

    "mps" is used only when asked for, as it lacks float64. "cuda" without a usable GPU becomes "cpu" with a warning.
    Raises UserError for an unknown name or for the number of a GPU that is not there.
    """
    if requested not in ("auto", "cpu", "mps") and not re.fullmatch(r"cuda(:\d+)?", requested):
        raise UserError(f'device "{requested}" is unknown; use auto, cpu, cuda, cuda:N or mps')
    if requested == "cpu":
        return "cpu"
    if requested == "mps":
        return _mps_or_cpu()
    probe = probe_torch_cuda()
    if not probe.works:
        if requested != "auto":
            logger.warning(
                "device %s was asked for but is not usable, so the CPU is used (%s)", requested, probe.reason
            )
        return "cpu"
    if ":" in requested:
        _check_gpu_number(requested)
    return "cuda" if requested == "auto" else requested


def choose_dtype(requested: str = "auto", *, device: str) -> str:
    """Resolve the dtype of a network: "float32", "bfloat16" or "float16".

    "auto" is bfloat16 where the device has it in hardware (a GPU of compute capability 8 or more, a CPU with AMX), else
    float32. "float16" on a CPU becomes "auto" with a warning. Raises UserError for an unknown name.
    """
    if requested not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f'dtype "{requested}" is unknown; use auto, float32, bfloat16 or float16')
    if requested == "float16" and device == "cpu":
        logger.warning("dtype float16 is not for CPUs; auto is used instead")
        requested = "auto"
    if requested == "auto":
        return "bfloat16" if _has_fast_bfloat16(device) else "float32"
    if requested == "bfloat16" and device == "cpu" and not (cpu_has_amx() or "avx512_bf16" in _cpu_flags()):
        logger.warning("dtype bfloat16 on a CPU without AMX or AVX512_BF16 is usually slower than float32")
    return requested


@lru_cache(maxsize=1)
def cpu_has_amx() -> bool:
    """Whether the processor multiplies bfloat16 tiles (AMX) and the system lets us use it."""
    if not {"amx_bf16", "amx_tile"} <= _cpu_flags():
        return False
    try:
        import torch
    except ImportError:
        return True
    # A private function of torch: where it is gone, the processor's own list decides.
    check = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return True if check is None else bool(check())


def _cpu_flags() -> set[str]:
    """The instruction sets that Linux lists; none elsewhere, where no server processor with AMX is known to run."""
    try:
        return set(CPUINFO_PATH.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return set()


@lru_cache(maxsize=1)
def probe_cuml() -> ProbeResult:
    """Cluster four points with cuML, once per process."""
    import numpy as np

    points = np.array([[0, 0], [0, 1], [9, 9], [9, 8]], dtype=np.float32)
    try:
        cluster = importlib.import_module("cuml.cluster")
        model = cluster.KMeans(n_clusters=2, random_state=0, output_type="numpy").fit(points)
        labels = np.asarray(model.labels_)
    except ModuleNotFoundError as error:
        return ProbeResult(False, f"cuML is not installed ({error})")
    except Exception as error:  # drivers, CUDA, cupy and RMM each raise their own kinds, and all mean "not here"
        return ProbeResult(False, f"cuML does not compute here ({type(error).__name__}: {_first_line(error)})")
    if labels[0] != labels[1] or labels[2] != labels[3] or labels[0] == labels[2]:
        return ProbeResult(False, "cuML gives wrong results here (two far pairs were not told apart)")
    return ProbeResult(True, f"cuML {getattr(importlib.import_module('cuml'), '__version__', '?')} computes")


@lru_cache(maxsize=1)
def probe_torch_cuda() -> ProbeResult:
    """Add two numbers with torch on the GPU, once per process."""
    if "torch" not in sys.modules and not _may_have_gpu():
        return ProbeResult(False, "the system lists no GPU")  # a second saved: what it takes to import torch
    try:
        import torch
    except ModuleNotFoundError:
        return ProbeResult(False, "torch is not installed")
    if not torch.cuda.is_available():
        return ProbeResult(False, "torch sees no GPU")
    try:
        total = float(torch.ones(2, device="cuda").sum().item())
    except RuntimeError as error:  # a GPU that this build of torch has no code for, or one out of memory
        return ProbeResult(False, f"torch sees a GPU but cannot compute on it ({_first_line(error)})")
    return ProbeResult(total == 2.0, f"torch computes on {torch.cuda.get_device_name()}")


def _may_have_gpu() -> bool:
    """Whether the system lists a device that a GPU of any kind needs; true where that cannot be told."""
    try:
        names = [path.name for path in DEVICES_FOLDER.iterdir()]
    except OSError:
        return True
    return not sys.platform.startswith("linux") or any(name.startswith(GPU_DEVICES) for name in names)


def _best_backend() -> Backend:
    cuml = probe_cuml()
    if cuml.works:
        return Backend("cuml", "cuda", cuml.reason)
    torch_cuda = probe_torch_cuda()
    if torch_cuda.works:
        return Backend("torch_cuda", "cuda", f"{torch_cuda.reason}; {cuml.reason}")
    return Backend("cpu", "cpu", f"{cuml.reason}; {torch_cuda.reason}")


def _mps_or_cpu() -> str:
    try:
        import torch
    except ModuleNotFoundError:
        available = False
    else:
        available = torch.backends.mps.is_available()
    if not available:
        logger.warning("device mps was asked for but is not usable, so the CPU is used")
    return "mps" if available else "cpu"


def _check_gpu_number(device: str) -> None:
    import torch

    n_gpus = torch.cuda.device_count()
    if int(device.split(":")[1]) >= n_gpus:
        raise UserError(f"device {device} is not there: this machine has {n_gpus} GPUs, cuda:0 to cuda:{n_gpus - 1}")


def _has_fast_bfloat16(device: str) -> bool:
    if device == "cpu":
        return cpu_has_amx()
    if not device.startswith("cuda"):
        return False
    import torch

    return torch.cuda.get_device_capability(device)[0] >= 8


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else "no message"

"""The backend is what computes, not what imports."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest

from common import backend
from common.config import UserError


class KMeansStandIn:
    """cuML's KMeans as far as the probe uses it: keyword-only arguments, fit returns the model, labels_."""

    labels = (0, 0, 1, 1)

    def __init__(self, *, n_clusters=8, random_state=None, output_type=None):
        assert (n_clusters, output_type) == (2, "numpy")

    def fit(self, vectors):
        assert vectors.dtype == np.float32
        self.labels_ = np.array(self.labels)
        return self


class KMeansWithoutDriver(KMeansStandIn):
    def fit(self, vectors):
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient\nand a second line")


class KMeansThatErrs(KMeansStandIn):
    labels = (0, 1, 0, 1)


@pytest.fixture(autouse=True)
def _forget_probes():
    yield
    for probe in (backend.probe_cuml, backend.probe_torch_cuda, backend.cpu_has_amx):
        probe.cache_clear()


@pytest.fixture
def install_cuml(monkeypatch):
    def install(kmeans_class):
        for probe in (backend.probe_cuml, backend.probe_torch_cuda):
            probe.cache_clear()
        cuml, cluster = ModuleType("cuml"), ModuleType("cuml.cluster")
        cuml.__version__ = "26.10.00"
        cluster.KMeans = kmeans_class
        monkeypatch.setitem(sys.modules, "cuml", cuml)
        monkeypatch.setitem(sys.modules, "cuml.cluster", cluster)

    return install


@pytest.fixture
def no_gpu(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend.probe_torch_cuda.cache_clear()


def test_auto_is_cuml_where_cuml_computes(install_cuml, caplog):
    install_cuml(KMeansStandIn)
    with caplog.at_level(logging.INFO, logger="common.backend"):
        chosen = backend.choose_backend("auto")
    assert (chosen.name, chosen.device, chosen.uses_cuml) == ("cuml", "cuda", True)
    assert "cuML 26.10.00 computes" in caplog.text


def test_cuml_that_imports_but_fails_at_fit_is_not_chosen(install_cuml, no_gpu):
    install_cuml(KMeansWithoutDriver)
    chosen = backend.choose_backend("auto")
    assert chosen.name == "cpu"
    assert "RuntimeError: cudaErrorInsufficientDriver" in chosen.reason
    assert "second line" not in chosen.reason


def test_cuml_that_computes_nonsense_is_not_chosen(install_cuml, no_gpu):
    install_cuml(KMeansThatErrs)
    assert backend.choose_backend("auto").name == "cpu"


def test_absent_cuml_falls_back_and_cuda_warns(monkeypatch, no_gpu, caplog):
    monkeypatch.setitem(sys.modules, "cuml", None)
    backend.probe_cuml.cache_clear()
    with caplog.at_level(logging.WARNING, logger="common.backend"):
        assert backend.choose_backend("auto").name == "cpu"
        assert caplog.text == ""
        assert backend.choose_backend("cuda").name == "cpu"
    assert "backend: cuda was asked for but no GPU is usable" in caplog.text
    assert "cuML is not installed" in caplog.text


def test_gpu_without_cuml_is_torch(monkeypatch):
    monkeypatch.setattr(backend, "probe_cuml", lambda: backend.ProbeResult(False, "cuML is not installed"))
    monkeypatch.setattr(backend, "probe_torch_cuda", lambda: backend.ProbeResult(True, "torch computes on X"))
    chosen = backend.choose_backend("cuda")
    assert (chosen.name, chosen.device, chosen.uses_cuml) == ("torch_cuda", "cuda", False)
    assert "cuML is not installed" in chosen.reason


def test_cpu_is_never_probed(monkeypatch):
    def fail():
        raise RuntimeError("probed")

    monkeypatch.setattr(backend, "probe_cuml", fail)
    assert backend.choose_backend("cpu").name == "cpu"


def test_probe_runs_once(install_cuml):
    fits = []

    class Counted(KMeansStandIn):
        def fit(self, vectors):
            fits.append(1)
            return super().fit(vectors)

    install_cuml(Counted)
    backend.choose_backend("auto")
    backend.choose_backend("cuda")
    assert len(fits) == 1


@pytest.mark.parametrize("call", [lambda: backend.choose_backend("gpu"), lambda: backend.choose_device("cuda:x")])
def test_unknown_names_are_user_errors(call):
    with pytest.raises(UserError, match="is unknown; use auto"):
        call()
    with pytest.raises(UserError, match="use auto, float32, bfloat16 or float16"):
        backend.choose_dtype("fp16", device="cpu")


def test_device_without_gpu(no_gpu, caplog):
    assert backend.choose_device("auto") == "cpu"
    assert caplog.text == ""
    assert backend.choose_device("cuda:1") == "cpu"
    assert "device cuda:1 was asked for" in caplog.text


def test_device_with_two_gpus(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(backend, "probe_torch_cuda", lambda: backend.ProbeResult(True, "torch computes on X"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert backend.choose_device("auto") == "cuda"
    assert backend.choose_device("cuda:1") == "cuda:1"
    with pytest.raises(UserError, match="this machine has 2 GPUs, cuda:0 to cuda:1"):
        backend.choose_device("cuda:2")


@pytest.mark.parametrize(
    ("flags", "expected", "warns"),
    [("fpu amx_bf16 amx_tile", True, False), ("fpu avx512_bf16", False, False), ("fpu avx2", False, True)],
)
def test_amx_is_read_from_the_processor_and_dtype_follows(tmp_path, monkeypatch, flags, expected, warns, caplog):
    torch = pytest.importorskip("torch")
    cpuinfo_path = tmp_path / "cpuinfo"
    cpuinfo_path.write_text(f"processor : 0\nflags : {flags}\n")
    monkeypatch.setattr(backend, "CPUINFO_PATH", cpuinfo_path)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    backend.cpu_has_amx.cache_clear()
    fast = "bfloat16" if expected else "float32"
    assert backend.cpu_has_amx() is expected
    assert backend.choose_dtype("auto", device="cpu") == fast
    assert caplog.text == ""
    assert backend.choose_dtype("float16", device="cpu") == fast
    assert "float16 is not for CPUs" in caplog.text
    assert backend.choose_dtype("bfloat16", device="cpu") == "bfloat16"
    assert ("usually slower than float32" in caplog.text) is warns


def test_amx_that_the_system_withholds_does_not_count(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    cpuinfo_path = tmp_path / "cpuinfo"
    cpuinfo_path.write_text("flags : amx_bf16 amx_tile\n")
    monkeypatch.setattr(backend, "CPUINFO_PATH", cpuinfo_path)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    backend.cpu_has_amx.cache_clear()
    assert backend.cpu_has_amx() is False


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), "bfloat16"), ((7, 5), "float32")])
def test_dtype_on_a_gpu(monkeypatch, capability, expected):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert backend.choose_dtype("auto", device="cuda:0") == expected
    assert backend.choose_dtype("float16", device="cuda:0") == "float16"


LOADS_TORCH = """
import sys
from pathlib import Path
from common import backend
backend.DEVICES_FOLDER = Path(sys.argv[1])
assert backend.choose_device("auto") in ("cpu", "cuda")
print("torch" in sys.modules)
"""


@pytest.mark.parametrize(("device", "loads"), [("null", "False"), ("nvidiactl", "True"), ("dxg", "True")])
def test_torch_is_loaded_to_look_for_a_gpu_only_where_the_system_lists_one(tmp_path, device, loads):
    (tmp_path / device).touch()
    command = [sys.executable, "-c", LOADS_TORCH, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": "."})
    assert done.stdout.strip() == loads

"""Imports go strictly downward, and nothing heavy is loaded before it is needed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom to the top: a module imports only from modules before it.
COMMON_LAYERS = [
    "config", "progress", "commit", "mapped", "columns", "threads", "thrift", "parquet_footer", "plain_vectors",
    "shards", "shard_writer", "extended_shard", "outputs", "layers", "class_probs", "text_tables", "tables",
    "backend", "workers", "engine", "stage", "grouping", "agreement", "escaping", "kmeans_steps", "kmeans_init",
    "kmeans", "vector_stream", "shard_kmeans", "vectors", "pca_file", "centroids", "cluster_ids", "clustered_shards",
    "quality", "separation", "distance_sums", "silhouette", "best_scores", "neighbors", "cells", "umap_steps",
    "disjoint_sets", "umap_graph", "lanczos", "spectral_start", "umap_layout", "condensed_tree", "kd_tree",
    "single_linkage", "density", "pseudo_labels", "labeler",
    "class_cuts", "dataset_table", "holdout", "pooled_head", "model_files", "pooling", "checkpoint", "encoder",
    "charts", "figures", "report_data", "report", "cluster_samples", "cluster_report", "purity_report", "numba_cache",
    "cli",
]  # fmt: skip

# Of the parts of one script none imports from those of another.
PARTS = ("image_parts", "llm_parts", "metric_parts")
# But for this: fine-tuning an embedder on its own clusters is to use the loss that the trainer does, not a second one.
ALLOWED = {("llm_parts/clio/self_training.py", "metric_parts.losses.supcon")}

HEAVY = {
    "cuml", "cv2", "dask", "hdbscan", "joblib", "matplotlib", "openai", "anthropic", "optuna", "pandas", "PIL",
    "plotly", "pyarrow", "safetensors", "scipy", "skimage", "sklearn", "torch", "transformers", "umap",
}  # fmt: skip
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


def modules_of(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py")


def imports(tree: ast.AST, *, top_level_only: bool = False) -> list[tuple[int, str]]:
    """Line and full name of every imported module; those for type checkers alone do not count."""
    found: list[tuple[int, str]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif not (top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            found += imports(node, top_level_only=top_level_only)
    return found


def common_module(name: str) -> str | None:
    """The module of common that an import names, or None; `from common import cli` names cli."""
    parts = name.split(".")
    return parts[1] if parts[0] == "common" and len(parts) > 1 else None


def upward_imports(module: str, source: str, layers: list[str] = COMMON_LAYERS) -> list[str]:
    """The imports of one module of common that do not go downward; a module that is in no layer is one too."""
    if module not in layers:
        return [f"common/{module}.py is in no layer; write it into COMMON_LAYERS"]
    below = set(layers[: layers.index(module)])
    wrong = []
    for line, name in imports(ast.parse(source)):
        imported = common_module(name)
        own = name.partition(".")[0]
        if (imported and imported not in below) or own in PARTS or f"{own}.py" in SCRIPTS:
            wrong.append(f"common/{module}.py:{line} imports {name}")
    return wrong


def test_every_layer_is_a_module_and_stands_once():
    assert len(set(COMMON_LAYERS)) == len(COMMON_LAYERS)
    assert sorted(COMMON_LAYERS) == [path.stem for path in modules_of("common")]


@pytest.mark.parametrize("path", modules_of("common"), ids=lambda path: path.stem)
def test_common_imports_downward(path):
    assert upward_imports(path.stem, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("part", PARTS)
def test_parts_import_common_and_themselves_alone(part):
    wrong = []
    for path in modules_of(part):
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            own = name.partition(".")[0]
            if (path.relative_to(ROOT).as_posix(), name) in ALLOWED:
                continue
            if own in {*PARTS, "demo", "tests", "benchmarks"} - {part} or f"{own}.py" in SCRIPTS:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("part", PARTS)
def test_parts_have_no_circle(part):
    imported_by = {path: part_imports(path, part) for path in modules_of(part)}
    assert find_circle({module_name(path): names for path, names in imported_by.items()}) is None


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_no_other_script(script):
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    own = script.removesuffix(".py")
    other = [name for _, name in imports(tree) if f"{name.partition('.')[0]}.py" in SCRIPTS]
    assert [name for name in other if name.partition(".")[0] != own] == []


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def part_imports(path: Path, part: str) -> set[str]:
    """The modules of a part that one of its modules imports."""
    known = {module_name(other) for other in modules_of(part)}
    names = {name for _, name in imports(ast.parse(path.read_text(encoding="utf-8")))}
    return {module for module in known for name in names if name == module or name.startswith(f"{module}.")}


def find_circle(graph: dict[str, set[str]]) -> list[str] | None:
    """A path that comes back to its start, or None."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        circles = (visit(name, [*path, module]) for name in sorted(graph.get(module, ())))
        circle = next((circle for circle in circles if circle), None)
        done.add(module)
        return circle

    return next((circle for module in sorted(graph) if (circle := visit(module, []))), None)


# --- Negative controls: the tests above can fail ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "from common.engine import map_items",
        "import common.cli",
        "from common import cli",
        "def late():\n    from common.stage import write_missing_shards",
        "from image_parts.scan import scan",
        "import cluster_supervise",
        "from common.shards import Shard",  # itself
    ],
)
def test_upward_import_is_found(line):
    assert len(upward_imports("shards", f"from common.config import UserError\n{line}\n")) == 1


def test_downward_import_and_one_for_type_checkers_are_not_found():
    source = "from common.commit import Identity\nif TYPE_CHECKING:\n    from common.engine import map_items\n"
    assert upward_imports("shards", source) == []
    assert upward_imports("newcomer", "") == ["common/newcomer.py is in no layer; write it into COMMON_LAYERS"]


def test_circle_is_found():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_heavy_import_is_found():
    source = (
        "import json\nif TYPE_CHECKING:\n    import torch\nclass A:\n    import pandas\ndef f():\n    import sklearn\n"
    )
    assert heavy_imports(source) == ["line 5: pandas"]


# --- Weight ----------------------------------------------------------------------------------------------------------


def heavy_imports(source: str) -> list[str]:
    """Heavy libraries that are loaded when the module is."""
    found = imports(ast.parse(source), top_level_only=True)
    return [f"line {line}: {name}" for line, name in found if name.partition(".")[0] in HEAVY]


@pytest.mark.parametrize(
    "path", [*modules_of("common"), *(ROOT / name for name in SCRIPTS)], ids=lambda path: path.name
)
def test_no_heavy_import_at_the_top_of_common_and_scripts(path):
    assert heavy_imports(path.read_text(encoding="utf-8")) == []


PROBE = """
import json, runpy, sys
script, *arguments = sys.argv[1:]
sys.argv = [script, *arguments]
try:
    runpy.run_path(script, run_name="__main__")
    code = 0
except SystemExit as end:
    code = end.code or 0
print()
print(json.dumps({"code": code, "loaded": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def loaded_by(script: str, *arguments: str) -> tuple[int, set[str]]:
    """Exit code of a command, and the heavy libraries that were loaded when it ended."""
    command = [sys.executable, "-c", PROBE, script, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    report = json.loads(ended.stdout.splitlines()[-1])
    return report["code"], HEAVY & set(report["loaded"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_nothing_heavy(script):
    assert loaded_by(script, "--help") == (0, set())


@pytest.mark.parametrize("script", SCRIPTS)
def test_config_error_loads_nothing_heavy(script, tmp_path):
    config = tmp_path / "wrong.yaml"
    config.write_text("suprvise:\n  batch_sise: 3\nrandom_sed: 1\n", encoding="utf-8")
    assert loaded_by(script, "--config", str(config)) == (2, set())

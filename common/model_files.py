"""Which model is meant, and the files beside its weights, in a local folder, in a package or on the hub."""

from __future__ import annotations

import importlib.util
import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from common.commit import fingerprint_files
from common.config import UserError


def resolve_model(model_name_or_path: str) -> str:
    """A folder for `package:MODULE/SUBFOLDER` and for a local path, else the Hugging Face id as it is.

    Raises UserError where the package is not installed or the folder is no model.
    """
    if model_name_or_path.startswith("package:"):
        module, _, subfolder = model_name_or_path.removeprefix("package:").partition("/")
        spec = _find_package(module)
        if spec is None or spec.origin is None:
            raise UserError(
                f"model {model_name_or_path}: the package {module} is not installed; "
                f"run: pip install {module.replace('_', '-')}"
            )
        return str(_require_model_folder(Path(spec.origin).parent / subfolder))
    path = Path(model_name_or_path)
    if path.exists() or model_name_or_path.startswith((".", "/", "~")):
        return str(_require_model_folder(path.expanduser()))
    return model_name_or_path


def _find_package(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):  # a parent that is not there, or no name at all
        return None


def _require_model_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; check the model in the config")
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {folder} has no config.json; give the folder that save_pretrained wrote")
    return folder


def model_fingerprint(model_name_or_path: str, *, revision: str | None = None) -> str:
    """What identifies a model's weights: the content of a local folder, or id and commit on the hub."""
    resolved = resolve_model(model_name_or_path)
    if Path(resolved).is_dir():
        return fingerprint_files(sorted(path for path in Path(resolved).rglob("*") if _shapes_vectors(path)))
    return f"{resolved}@{_hub_commit(resolved, revision)}"


def _shapes_vectors(path: Path) -> bool:
    return path.is_file() and path.suffix in {".json", ".txt", ".safetensors", ".bin", ".model", ".py"}


def _hub_commit(model_id: str, revision: str | None) -> str:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_id, revision=revision)
    except (OSError, ValueError) as problem:
        raise cannot_load(model_id, problem) from None
    return str(getattr(config, "_commit_hash", None) or revision or "main")


def cannot_load(model: str, problem: Exception) -> UserError:
    """The error for whatever transformers raised over a model."""
    reason = " ".join(str(problem).split())[:300]
    return UserError(
        f"model {model} cannot be loaded ({reason}); check the model in the config, or the network for a hub id"
    )


# --- Files beside the weights ----------------------------------------------------------------------------------------


def find_side_file(model: str, name: str, *, revision: str | None = None) -> Path | None:
    """A file beside the weights, in a local folder or fetched from the hub; None where the model has none."""
    path = str(Path(model) / name) if Path(model).is_dir() else _from_hub(model, name, revision)
    return Path(path) if path is not None and Path(path).is_file() else None


def read_side_file(model: str, name: str, *, revision: str | None = None) -> dict[str, Any] | None:
    """A JSON file beside the weights; None where the model has none."""
    path = find_side_file(model, name, revision=revision)
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path else None


def _from_hub(model_id: str, name: str, revision: str | None) -> str | None:
    from transformers.utils import cached_file

    return cached_file(  # type: ignore[no-any-return]
        model_id,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )

"""A fitted PCA on the disk: `pca.safetensors` for programs, `pca.json` beside it for people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.commit import Identity, write_bytes, write_json
from common.config import UserError
from common.vectors import Pca


@dataclass(frozen=True)
class SavedPca(Pca):
    """A PCA read from the disk, and the fingerprint of the configuration that fitted it."""

    fingerprint: str = ""


def save_pca(path: Path, pca: Pca, identity: Identity, *, n_rows: int) -> None:
    """Write the arrays and, beside them, the explained variance of each component as JSON."""
    from safetensors.numpy import save

    arrays = {
        "mean": pca.mean,
        "components": pca.components,
        "explained_variance": pca.explained_variance,
        "explained_variance_ratio": pca.explained_variance_ratio,
    }
    # One entry only: safetensors writes several in an order that changes from run to run.
    metadata = {"fingerprint": identity.fingerprint}
    # The JSON goes first and comes last, so that both are there only together.
    path.with_suffix(".json").unlink(missing_ok=True)
    write_bytes(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata))
    facts = {
        "n_rows": n_rows,
        "n_components": pca.n_components,
        "explained_variance_total": float(pca.explained_variance_ratio.sum()),
        "explained_variance_ratio": pca.explained_variance_ratio.tolist(),
        "identity": identity.to_dict(),
    }
    write_json(path.with_suffix(".json"), facts)


def load_pca(path: Path) -> SavedPca:
    """Read a PCA; raises UserError where the file is damaged or lacks an array."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            fingerprint = (file.metadata() or {}).get("fingerprint", "")
        return SavedPca(**arrays, fingerprint=fingerprint)
    except (SafetensorError, OSError, TypeError) as problem:
        raise UserError(f"PCA {path} cannot be read ({problem}); delete it and run stage 2 again") from None

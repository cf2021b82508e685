"""What turns prepared squares into a vector: a Hugging Face network by AutoModel, or HOG without weights.

No image processor is used: the squares come from `preprocess.py`, and here they are only scaled by the mean and the
deviation that the network was trained with.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.backend import choose_device, choose_dtype
from common.commit import fingerprint_files
from common.config import UserError
from image_parts.settings import HOG, KNOWN_MODELS, ModelSettings

log = logging.getLogger(__name__)

# Of ImageNet, which DINOv2, DINOv3 and ResNet were trained with; a model's own preprocessor_config.json wins.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

_ADVICE = "give model.name a local folder that AutoModel loads, or use model.name=hog, which needs no weights"

_HOG_BLOCK_CELLS = 2  # blocks of 2 x 2 cells are normalised together, as in Dalal and Triggs, CVPR 2005


class Extractor(Protocol):
    """Anything that gives one vector for each image."""

    dimension: int

    def embed(self, planes: np.ndarray) -> np.ndarray:
        """Vectors [b, d] float32 of prepared images [b, p, s, s, c] uint8, the mean over their p polarities."""
        ...


@dataclass(frozen=True)
class ModelIdentity:
    """Which weights exactly: goes into the key of the feature cache."""

    source: str  # "hog", a repository or a folder
    revision: str  # a commit, a hash of the files, or the version of the method
    dtype: str
    device: str

    def cache_key(self) -> dict[str, str]:
        """What changes the vectors; a folder is known by its content, wherever it lies. The device changes nothing."""
        source = "folder" if Path(self.source).is_dir() else self.source
        return {"source": source, "revision": self.revision, "dtype": self.dtype}


def identify_model(settings: ModelSettings) -> ModelIdentity:
    """Find out which weights `settings` mean, without loading them.

    Raises UserError where a folder holds no model, or where the newest revision of a repository cannot be asked for.
    """
    if settings.name == HOG:
        return ModelIdentity(HOG, f"1 {settings.hog_cells} {settings.hog_orientations}", "float32", "cpu")
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device=device)
    folder = Path(settings.name).expanduser()
    if folder.is_dir():
        return ModelIdentity(str(folder.resolve()), _folder_revision(folder), dtype, device)
    repository, pinned, _ = KNOWN_MODELS.get(settings.name, (settings.name, None, 0))
    if settings.name.startswith((".", "/", "~")) or settings.name.count("/") > 1:
        raise UserError(
            f"model.name {settings.name} is no folder; give a folder with config.json, or a Hugging Face id"
        )
    revision = settings.revision or pinned or _newest_revision(repository)
    return ModelIdentity(repository, revision, dtype, device)


def make_extractor(settings: ModelSettings, identity: ModelIdentity) -> Extractor:
    """Load the network of `identity`, or make the HOG extractor; raises UserError where it cannot be loaded."""
    if settings.name == HOG:
        return HogExtractor(settings)
    try:
        return NetworkExtractor(settings, identity)
    except ModuleNotFoundError as problem:
        if problem.name not in ("torch", "transformers"):
            raise
        raise UserError(
            f"model {settings.name} needs {problem.name}, which is not installed: pip install -r requirements.txt, or "
            f"use model.name=hog. Features in the cache need it not, if model.dtype is the one they were made with"
        ) from None


class HogExtractor:
    """Histograms of oriented gradients by scikit-image: needs no weights and no network."""

    def __init__(self, settings: ModelSettings) -> None:
        self._cell_pixels = settings.image_size // settings.hog_cells
        self._orientations = settings.hog_orientations
        n_blocks = settings.image_size // self._cell_pixels - _HOG_BLOCK_CELLS + 1
        self.dimension = n_blocks**2 * _HOG_BLOCK_CELLS**2 * self._orientations

    def embed(self, planes: np.ndarray) -> np.ndarray:
        """Vectors [b, d] float32 of prepared images [b, p, s, s, c] uint8."""
        return np.stack([np.mean([self._describe(plane) for plane in image], axis=0) for image in planes])

    def _describe(self, plane: np.ndarray) -> np.ndarray:
        from skimage.feature import hog

        vector = hog(
            plane[:, :, 0] if plane.shape[2] == 1 else plane,
            orientations=self._orientations,
            pixels_per_cell=(self._cell_pixels, self._cell_pixels),
            cells_per_block=(_HOG_BLOCK_CELLS, _HOG_BLOCK_CELLS),
            channel_axis=None if plane.shape[2] == 1 else 2,
        )
        return vector.astype(np.float32)


class NetworkExtractor:
    """A vision network of transformers on one device."""

    def __init__(self, settings: ModelSettings, identity: ModelIdentity) -> None:
        import torch

        self._pooling = settings.pooling
        self._device, self._dtype = identity.device, getattr(torch, identity.dtype)
        self._network = _load_network(identity).to(device=self._device, dtype=self._dtype)
        self._config = self._network.config
        _check_image_size(settings, self._config)
        self._has_cls = any(
            name.endswith(("cls_token", "class_embedding")) for name, _ in self._network.named_parameters()
        )
        mean, std = _normalization(identity)
        self._mean = torch.tensor(mean, device=self._device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=self._device).view(1, 3, 1, 1)
        self.dimension = self._probe_dimension(settings)

    def embed(self, planes: np.ndarray) -> np.ndarray:
        """Vectors [b, d] float32 of prepared images [b, p, s, s, c] uint8."""
        import torch

        n_images, n_polarities, side, _, n_channels = planes.shape
        with torch.inference_mode():
            pixels = torch.from_numpy(planes).to(self._device).view(-1, side, side, n_channels).permute(0, 3, 1, 2)
            scaled = (pixels.float() / 255).expand(-1, 3, -1, -1)  # grey becomes RGB here, after the transfer
            output = self._network(pixel_values=((scaled - self._mean) / self._std).to(self._dtype))
            pooled = self._pool(output).float()  # [b * p, d]
            return pooled.view(n_images, n_polarities, -1).mean(dim=1).cpu().numpy()

    def _pool(self, output: Any) -> Any:
        import torch

        hidden = output.last_hidden_state
        if self._pooling == "cls":
            return self._summary(output)
        patches = hidden.flatten(2).mean(dim=2) if hidden.ndim == 4 else hidden[:, self._n_prefix :].mean(dim=1)
        return patches if self._pooling == "mean_patch" else torch.cat([self._summary(output), patches], dim=1)

    def _summary(self, output: Any) -> Any:
        """The one vector that a network has for the whole image: the CLS token, or its pooled features."""
        if self._has_cls:
            return output.last_hidden_state[:, 0]
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        hidden = output.last_hidden_state
        return hidden.flatten(2).mean(dim=2) if hidden.ndim == 4 else hidden.mean(dim=1)

    @property
    def _n_prefix(self) -> int:
        """Tokens before the patches: CLS and registers."""
        return int(self._has_cls) + int(getattr(self._config, "num_register_tokens", 0) or 0)

    def _probe_dimension(self, settings: ModelSettings) -> int:
        blank = np.zeros((1, 1, settings.image_size, settings.image_size, 1), np.uint8)
        return int(self.embed(blank).shape[1])


def _load_network(identity: ModelIdentity) -> Any:
    from transformers import AutoModel

    try:
        revision = None if Path(identity.source).is_dir() else identity.revision
        model = AutoModel.from_pretrained(identity.source, revision=revision or "main", dtype="float32")
    except (OSError, ValueError, ImportError) as problem:
        raise UserError(f"model {identity.source} cannot be loaded: {_first_line(problem)}; {_ADVICE}") from None
    return getattr(model, "vision_model", model).eval()


def _check_image_size(settings: ModelSettings, config: Any) -> None:
    patch = getattr(config, "patch_size", None)
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    if patch and settings.image_size % patch:
        lower = settings.image_size // patch * patch
        raise UserError(
            f"model.image_size {settings.image_size} is not a multiple of the patch size {patch} of {settings.name}: "
            f"the rest would be cut off; use {lower} or {lower + patch}"
        )


def _normalization(identity: ModelIdentity) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation from the model's preprocessor_config.json, else those of ImageNet."""
    from transformers.utils import cached_file

    folder = Path(identity.source)
    if folder.is_dir():
        path = folder / "preprocessor_config.json"
        found = str(path) if path.is_file() else None
    else:
        found = cached_file(
            identity.source,
            "preprocessor_config.json",
            revision=identity.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    values = json.loads(Path(found).read_text(encoding="utf-8")) if found else {}
    return tuple(values.get("image_mean", _IMAGENET_MEAN)), tuple(values.get("image_std", _IMAGENET_STD))


def _folder_revision(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {folder} holds no config.json; give a folder that save_pretrained wrote")
    files = [path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin")]
    return fingerprint_files(sorted(files))


def _newest_revision(repository: str) -> str:
    """The commit that `main` means now, asked for online or from the local Hugging Face cache."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(repository)
    except (OSError, ValueError) as problem:
        raise UserError(f"model {repository} cannot be found: {_first_line(problem)}; {_ADVICE}") from None
    return str(getattr(config, "_commit_hash", None) or "main")


def _first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(problem).__name__

"""All settings of config.yaml, typed and bounded. The file docs/image_cluster.md explains every key."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from common.config import RunSettings, Section
from image_parts.tuning.settings import TuningSettings

# Short names of the models that the field uses most, with the repository, the pinned revision and the patch size.
# A null revision means the newest one of the repository.
KNOWN_MODELS: dict[str, tuple[str, str | None, int]] = {
    "dinov2_vits14": ("facebook/dinov2-small", "ed25f3a31f01632728cabb09d1542f84ab7b0056", 14),
    "dinov2_vitb14": ("facebook/dinov2-base", "f9e44c814b77203eaa57a6bdbbd535f21ede1415", 14),
    "resnet50": ("microsoft/resnet-50", None, 1),
}
HOG = "hog"


def _extension(value: str) -> str:
    """`PNG`, `.png` and `*.png` are all `.png`."""
    name = value.strip().lower().removeprefix("*").removeprefix(".")
    if not name or "/" in name or "." in name:
        raise ValueError(f"{value!r} is no file extension; write it as .png")
    return f".{name}"


class ModelSettings(Section):
    """The network, or `hog`, that turns an image into a vector."""

    name: str = Field(
        "dinov2_vits14",
        min_length=1,
        description="dinov2_vits14 (384-d), dinov2_vitb14 (768-d), resnet50 (2048-d), hog (no weights), or any "
        "Hugging Face id or local folder that AutoModel loads",
    )
    revision: str | None = Field(None, description="commit of the Hugging Face repository; null: the pinned or newest")
    batch_size: int = Field(32, ge=1, description="images in one pass through the network")
    image_size: int = Field(224, ge=16, le=4096, description="side in pixels; a multiple of the patch size")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="number format of the network")
    pooling: Literal["cls", "mean_patch", "cls+mean"] = Field("cls", description="which tokens become the vector")
    num_workers: int = Field(-1, ge=-1, le=256, description="threads that decode ahead of the network; -1: one a core")
    hog_cells: int = Field(8, ge=2, le=64, description="hog only: cells along each side")
    hog_orientations: int = Field(9, ge=2, le=36, description="hog only: directions of edges that are told apart")

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        patch = KNOWN_MODELS.get(self.name, ("", None, 1))[2]
        if self.image_size % patch:
            lower = self.image_size // patch * patch
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of the patch size {patch} of {self.name}; "
                f"use {lower} or {lower + patch}"
            )
        if self.name == HOG and self.image_size < 4 * self.hog_cells:
            raise ValueError(
                f"image_size {self.image_size} is too small for hog_cells {self.hog_cells}: 4 pixels a cell"
            )
        return self


class PreprocessingSettings(Section):
    """What is done to an image before the network sees it."""

    grayscale: bool = Field(True, description="drop the colour; false: equalise the lightness and keep the colour")
    clahe: bool = Field(True, description="equalise the contrast; false means equalization: none")
    equalization: Literal["clahe", "he", "none"] = Field(
        "clahe", description="clahe: locally; he: over the whole image"
    )
    clahe_clip_limit: float = Field(3.0, gt=0, description="how far CLAHE may raise the contrast of a tile")
    clahe_grid_size: int = Field(8, ge=1, le=64, description="tiles of CLAHE along each side")
    polarity_invariant: bool = Field(True, description="an image and its negative get the same vector")
    l2_normalize: bool = Field(True, description="vectors of length 1, so that a dot product is a cosine")
    trim_top: float = Field(0.0, ge=0, lt=1, description="share of the height that is cut off at the top")
    trim_bottom: float = Field(0.0, ge=0, lt=1, description="share of the height that is cut off at the bottom")
    trim_left: float = Field(0.0, ge=0, lt=1, description="share of the width that is cut off at the left")
    trim_right: float = Field(0.0, ge=0, lt=1, description="share of the width that is cut off at the right")
    resize: Literal["letterbox", "crop", "squash"] = Field("letterbox", description="how an image becomes a square")

    @model_validator(mode="after")
    def _check_trims(self) -> Self:
        if self.trim_top + self.trim_bottom >= 1 or self.trim_left + self.trim_right >= 1:
            raise ValueError("the trims of two opposite sides leave nothing: their sum must be below 1")
        return self

    @property
    def effective_equalization(self) -> str:
        """The equalization that takes place: `clahe: false` switches it off."""
        return self.equalization if self.clahe else "none"


class CacheSettings(Section):
    """The features on disk, so that a second run does not compute them again."""

    enabled: bool = Field(True, description="keep features and the image index on disk")
    cache_dir: str = Field(".cache", min_length=1, description="folder of the cache; several inputs may share it")


class ReductionSettings(Section):
    """From features to the few dimensions in which HDBSCAN works."""

    pca_components: int = Field(50, ge=1, description="dimensions after PCA; capped by the number of images")
    umap_components: int = Field(10, ge=2, le=100, description="dimensions after UMAP")
    umap_n_neighbors: int = Field(15, ge=2, description="neighbours that UMAP keeps together; more: coarser clusters")
    umap_min_dist: float = Field(0.1, ge=0, le=0.99, description="how tightly UMAP may pack points")
    umap_metric: Literal["cosine", "euclidean", "manhattan", "correlation"] = Field(
        "cosine", description="distance between PCA vectors"
    )
    random_state: int | None = Field(42, ge=0, description="seed; null is faster and parallel, but differs each time")


class ClusteringSettings(Section):
    """HDBSCAN, and what happens to the images that it calls noise."""

    min_cluster_size: int = Field(50, ge=2, description="images that make a cluster")
    min_samples: int = Field(10, ge=1, description="higher: more noise; the image itself is not counted")
    cluster_selection_epsilon: float = Field(0.0, ge=0, description="clusters closer than this are merged")
    cluster_selection_method: Literal["leaf", "eom"] = Field("leaf", description="leaf: many even clusters")
    noise_handling: Literal["nearest", "separate"] = Field("nearest", description="nearest: noise joins a cluster")

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.min_samples > self.min_cluster_size:
            raise ValueError(f"min_samples {self.min_samples} is above min_cluster_size {self.min_cluster_size}")
        return self


class PuritySettings(Section):
    """How clean the clusters are, and when that is not enough."""

    enabled: bool = Field(True, description="compute the purity report")
    k_neighbors: int = Field(5, ge=1, description="nearest images, itself excluded, that the cross ratio looks at")
    max_centroid_cosine: float = Field(0.965, ge=-1, le=1, description="two centroids closer than this: FAIL")
    min_silhouette: float = Field(0.25, ge=-1, le=1, description="a silhouette below this: FAIL")
    silhouette_sample_size: int = Field(10_000, ge=2, description="images that the silhouette is computed for")
    silhouette_random_state: int = Field(42, ge=0, description="seed of that sample")
    max_nn_cross_ratio: float = Field(0.5, ge=0, le=1, description="a cluster with more foreign neighbours: FAIL")
    fail_on_fail: bool = Field(False, description="end with exit code 1 when the verdict is FAIL")
    truth: str | None = Field(
        None, description="true labels: parent_folder, or a CSV with the columns path and label; null: none"
    )


class VisualizationSettings(Section):
    """The pictures."""

    enabled: bool = Field(True, description="draw the pictures")
    viz_dir: str = Field("viz", min_length=1, description="folder of the pictures, below output_dir")
    projection: Literal["pca", "umap"] = Field(
        "pca", description="x y z from the reduced space by PCA, or by a UMAP of its own (slower)"
    )
    max_points: int = Field(5000, ge=1, description="points in the interactive scatter")
    thumbnail_size: int = Field(80, ge=16, le=256, description="pixels of the longer side")
    samples_per_cluster: int = Field(16, ge=1, le=400, description="images of each cluster in the grid")
    clahe_comparison_samples: int = Field(8, ge=1, le=64, description="images in the preprocessing comparison")

    @field_validator("viz_dir")
    @classmethod
    def _below_output(cls, value: str) -> str:
        if Path(value).is_absolute() or ".." in Path(value).parts or Path(value) == Path():
            raise ValueError("must be a folder below output_dir, such as viz")
        return value


class AnnotationSettings(Section):
    """The YOLO labels that travel with the images."""

    enabled: bool = Field(True, description="look for a label file beside each image and take it along")
    image_subdir: str = Field("img", description="folder of the images, in the input and in each cluster folder")
    label_subdir: str = Field("lab", description="folder of the labels that stands in its place")
    label_extension: str = Field(".txt", description="extension of the label files")
    layout: Literal["clusters", "ultralytics"] = Field(
        "clusters", description="clusters: cluster_000/img and lab; ultralytics: images/ and labels/ with data.yaml"
    )

    @field_validator("image_subdir", "label_subdir")
    @classmethod
    def _one_folder_name(cls, value: str) -> str:
        if value in ("", ".", "..") or "/" in value or "\\" in value or "\0" in value:
            raise ValueError("must be the name of one folder")
        return value

    @field_validator("label_extension")
    @classmethod
    def _with_dot(cls, value: str) -> str:
        return _extension(value)

    @model_validator(mode="after")
    def _check_subdirs(self) -> Self:
        if self.image_subdir.casefold() == self.label_subdir.casefold():
            raise ValueError("image_subdir and label_subdir must be two different folders")
        return self


class AccelerationSettings(Section):
    """Where reduction, clustering and purity run; the network has its own `model.device`."""

    backend: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto: cuML where it computes, else the CPU")


class ExportSettings(Section):
    """Files that other tools open."""

    embedding_atlas: bool = Field(True, description="embedding_atlas.parquet, thumbnails inside")
    fiftyone: bool = Field(True, description="fiftyone.csv")
    tensorboard: bool = Field(True, description="projector/: vectors, metadata, sprite")


class ImageSettings(RunSettings):
    """The whole of config.yaml."""

    input_dir: str = Field("", description="folder of images; all folders below it are searched")
    output_dir: str = Field("", description="folder of the results")
    mode: Literal["copy", "move", "hardlink", "symlink"] = Field("copy", description="how files get to their clusters")
    image_extensions: tuple[str, ...] = Field(
        (".jpg", ".jpeg", ".png", ".bmp", ".tiff"), min_length=1, description="which files are images; case is ignored"
    )
    model: ModelSettings = ModelSettings()
    preprocessing: PreprocessingSettings = PreprocessingSettings()
    cache: CacheSettings = CacheSettings()
    reduction: ReductionSettings = ReductionSettings()
    clustering: ClusteringSettings = ClusteringSettings()
    purity: PuritySettings = PuritySettings()
    visualization: VisualizationSettings = VisualizationSettings()
    annotations: AnnotationSettings = AnnotationSettings()
    exports: ExportSettings = ExportSettings()
    acceleration: AccelerationSettings = AccelerationSettings()
    tuning: TuningSettings = TuningSettings()  # read by iterative_tuning.py alone

    @field_validator("image_extensions")
    @classmethod
    def _clean_extensions(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_extension(value) for value in values))

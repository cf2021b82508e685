"""The feature matrix of a scanned folder: from the cache where it is there, computed and kept where it is not.

The matrix lies in a file and not in memory (`common.mapped`). It is by far the largest thing of a run, and most steps
after this one either do not need it or go through it row by row.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.config import UserError
from common.mapped import mapped_matrix, pieces, release
from common.progress import Progress, Stopwatch
from image_parts.cache import FeatureCache, RowKeys
from image_parts.extractors import Extractor, HogExtractor, ModelIdentity, identify_model, make_extractor
from image_parts.on_demand import OnDemand
from image_parts.preparation import Job, Outcome, describe_ahead, prepare_ahead
from image_parts.records import BadImage, ImageRecord, take_records
from image_parts.scan import ScannedImages, n_workers_of
from image_parts.settings import HOG, ImageSettings

log = logging.getLogger(__name__)

# Rows that are gone through at a time.
_PIECE_ROWS = 4096
# Rows that are computed before the memory of the matrix is given back.
_RELEASED_ROWS = 1024
# Raised when the same pixels give other vectors than before, so that old features are not mixed with new ones.
_EXTRACTION_VERSION = 1


@dataclass(frozen=True)
class Features:
    """The vectors of all images that could be decoded; images of equal content or equal vectors share a row."""

    records: Sequence[ImageRecord]
    rows: np.ndarray  # [n] int64: for each record its row in `vectors`
    vectors: np.ndarray  # [u, d] float32, L2-normalised if the settings say so; `release` gives its memory back
    bad: list[BadImage]  # those of the scan and those that could not be decoded
    value_range: tuple[float, float] | None
    n_cached: int  # rows that were read from the cache
    n_computed: int


def extract_features(scanned: ScannedImages, settings: ImageSettings, *, progress: bool = False) -> Features:
    """Give every readable image its vector.

    Raises UserError where the model cannot be loaded or where no image can be decoded.
    """
    watch = Stopwatch()
    identity = identify_model(settings.model)
    cache = (
        FeatureCache(Path(settings.cache.cache_dir), cache_key(settings, identity)) if settings.cache.enabled else None
    )
    contents = _distinct_contents(scanned)
    folder = _scratch_folder(settings)
    vectors, found = _from_cache(cache, contents.keys, folder)
    reasons: dict[int, str] = {}
    if not found.all():
        jobs = _Jobs(scanned, contents.first, np.flatnonzero(~found))
        extractor = make_extractor(settings.model, identity)
        if vectors is None:
            vectors = mapped_matrix((len(found), extractor.dimension), folder=folder)
        reasons = _compute(jobs, vectors, extractor, settings, cache, progress)
    features = _assemble(scanned, contents.rows, vectors, reasons, int(found.sum()))
    if settings.preprocessing.l2_normalize:
        _normalize_in_place(features.vectors)
    features = _merge_equal(features)
    log.info(
        "features: %d of %s, %d from the cache, %d computed, %d that could not be decoded, %.1f s",
        len(features.vectors), settings.model.name, features.n_cached, features.n_computed, len(reasons), watch.seconds,
    )  # fmt: skip
    return features


def cache_key(settings: ImageSettings, identity: ModelIdentity) -> dict[str, Any]:
    """Everything that changes a vector, apart from the image itself; L2 is applied after the cache."""
    preprocessing = settings.preprocessing.model_dump(mode="json", exclude={"l2_normalize", "clahe", "equalization"})
    preprocessing["equalization"] = settings.preprocessing.effective_equalization
    return {
        "extraction": _EXTRACTION_VERSION,
        "model": identity.cache_key(),
        "pooling": settings.model.pooling if settings.model.name != HOG else None,
        "image_size": settings.model.image_size,
        "preprocessing": preprocessing,
    }


@dataclass(frozen=True)
class _Contents:
    """The distinct contents of the images, in the order of their first image."""

    keys: RowKeys  # of each content in the cache, and its row
    rows: np.ndarray  # [n] int64: which content each image has
    first: np.ndarray  # [u] int64: the first image of each content


def _distinct_contents(scanned: ScannedImages) -> _Contents:
    keys, rows = RowKeys.of(_row_key(record, scanned.value_range) for record in scanned.records)
    return _Contents(keys, rows, np.unique(rows, return_index=True)[1])


def _row_key(record: ImageRecord, value_range: tuple[float, float] | None) -> str:
    """Content hash; images of more than 8 bits depend on the range of the data set too."""
    if not record.is_deep or value_range is None:
        return record.sha256
    return f"{record.sha256}@{value_range[0]!r}:{value_range[1]!r}"


@dataclass(frozen=True)
class _Jobs(OnDemand[Job]):
    """What has to be computed; a job is made when it is asked for."""

    scanned: ScannedImages
    first: np.ndarray  # [u] int64: the first image of each content
    missing: np.ndarray  # [m] int64: the rows of contents

    def __len__(self) -> int:
        return len(self.missing)

    def _make(self, number: int) -> Job:
        row = int(self.missing[number])
        record, value_range = self.scanned.records[int(self.first[row])], self.scanned.value_range
        return Job(row, _row_key(record, value_range), record.path, value_range)


def _scratch_folder(settings: ImageSettings) -> Path:
    """Where the matrix lies while it is used: beside the cache, or else where the results go."""
    return Path(settings.cache.cache_dir if settings.cache.enabled else settings.output_dir or ".").expanduser()


def _from_cache(cache: FeatureCache | None, wanted: RowKeys, folder: Path) -> tuple[np.ndarray | None, np.ndarray]:
    """The matrix with the rows that the cache has filled in, and which they are; no matrix where it has none."""
    dimension = cache.dimension() if cache else None
    if cache is None or dimension is None:
        return None, np.zeros(len(wanted), bool)
    vectors = mapped_matrix((len(wanted), dimension), folder=folder)
    return vectors, cache.read_into(vectors, wanted)


def _compute(
    missing: Sequence[Job],
    vectors: np.ndarray,
    extractor: Extractor,
    settings: ImageSettings,
    cache: FeatureCache | None,
    progress: bool,
) -> dict[int, str]:
    """Fill the missing rows of `vectors` and keep them in the cache; returns, by row, why one could not be computed."""
    reasons: dict[int, str] = {}
    n_workers = n_workers_of(settings.model.num_workers)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(cache.writer(extractor.dimension)) if cache else None
        bar = stack.enter_context(Progress(len(missing), label="features", unit="images", enabled=progress))
        if isinstance(extractor, HogExtractor):
            batches = describe_ahead(missing, settings, n_workers)
        else:
            batches = _embedded(missing, settings, n_workers, extractor.embed)
        for n_done, outcome in enumerate(batches):
            if n_done % _RELEASED_ROWS == 0:
                release(vectors)
            if outcome.array is None or not np.isfinite(outcome.array).all():
                reasons[outcome.job.row] = outcome.reason or "the network gave a vector that is not finite"
            else:
                vectors[outcome.job.row] = outcome.array
                if writer:
                    writer.add(outcome.job.key, outcome.array)
            bar.update(1)
    return reasons


def _embedded(
    jobs: Sequence[Job], settings: ImageSettings, n_workers: int, embed: Callable[[np.ndarray], np.ndarray]
) -> Iterator[Outcome]:
    """Vectors by the network, batch by batch; images that cannot be decoded come with their reason."""
    ready: list[Outcome] = []
    for outcome in prepare_ahead(jobs, settings, n_workers):
        if outcome.array is None:
            yield outcome
            continue
        ready.append(outcome)
        if len(ready) == settings.model.batch_size:
            yield from _embed_batch(ready, embed)
            ready = []
    if ready:
        yield from _embed_batch(ready, embed)


def _embed_batch(outcomes: list[Outcome], embed: Callable[[np.ndarray], np.ndarray]) -> list[Outcome]:
    embedded = embed(np.stack([outcome.array for outcome in outcomes if outcome.array is not None]))
    return [Outcome(outcome.job, vector) for outcome, vector in zip(outcomes, embedded, strict=True)]


def _assemble(
    scanned: ScannedImages,
    rows: np.ndarray,
    vectors: np.ndarray | None,
    reasons: dict[int, str],
    n_cached: int,
) -> Features:
    """Drop the rows that could not be computed, so that every row left is an image and none is shifted.

    `rows` [n] is the row of each image among the distinct contents.
    """
    good = np.ones(int(rows.max(initial=-1)) + 1, bool)
    good[list(reasons)] = False
    has_vector = good[rows]  # [n]
    lost = ((scanned.records[image], reasons[int(rows[image])]) for image in np.flatnonzero(~has_vector).tolist())
    bad = scanned.bad + [BadImage(record.path, record.relative_path, reason) for record, reason in lost]
    if vectors is None or not has_vector.any():
        raise UserError(
            f"none of the {len(bad)} files is an image that can be read; the first is "
            f"{bad[0].relative_path}: {bad[0].reason}"
        )
    new_rows = np.cumsum(good) - 1
    return Features(
        records=take_records(scanned.records, np.flatnonzero(has_vector)),
        rows=new_rows[rows[has_vector]],
        vectors=_keep_rows(vectors, good),
        bad=sorted(bad, key=lambda image: image.relative_path),
        value_range=scanned.value_range,
        n_cached=n_cached,
        n_computed=len(good) - n_cached - len(reasons),
    )


def _merge_equal(features: Features) -> Features:
    """Let files of other bytes but equal vectors, such as the same picture with other EXIF, share one row."""
    digests = np.empty((len(features.vectors), 16), np.uint8)
    for row, vector in enumerate(vector for part in pieces(features.vectors) for vector in part):
        digests[row] = np.frombuffer(hashlib.blake2b(vector, digest_size=16).digest(), np.uint8)
    _, first, of = np.unique(digests.view("V16").reshape(-1), return_index=True, return_inverse=True)
    keep = np.zeros(len(digests), bool)
    keep[first] = True
    merged = (np.cumsum(keep) - 1)[first[of]]  # for each row its new one
    return replace(features, rows=merged[features.rows], vectors=_keep_rows(features.vectors, keep))


def _keep_rows(matrix: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The kept rows, moved up in place: a copy of the matrix would double the memory."""
    if keep.all():
        return matrix
    kept = np.flatnonzero(keep)
    for start in range(0, len(kept), _PIECE_ROWS):
        part = kept[start : start + _PIECE_ROWS]
        matrix[start : start + len(part)] = matrix[part]
        release(matrix[start : part[-1] + 1])
    return matrix[: len(kept)]


def _normalize_in_place(vectors: np.ndarray) -> None:
    for part in pieces(vectors):
        lengths = np.linalg.norm(part.astype(np.float64), axis=1, keepdims=True)
        part /= np.maximum(lengths, 1e-12).astype(np.float32)

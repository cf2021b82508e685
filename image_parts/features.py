"""The feature matrix of a scanned folder: from the cache where it is there, computed and kept where it is not."""

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
from common.progress import Progress, Stopwatch
from image_parts.cache import FeatureCache
from image_parts.extractors import HogExtractor, ModelIdentity, identify_model, make_extractor
from image_parts.preparation import Job, Outcome, describe_ahead, prepare_ahead
from image_parts.records import BadImage, ImageRecord
from image_parts.scan import ScannedImages, n_workers_of
from image_parts.settings import HOG, ImageSettings

log = logging.getLogger(__name__)

# Raised when the same pixels give other vectors than before, so that old features are not mixed with new ones.
_EXTRACTION_VERSION = 1


@dataclass(frozen=True)
class Features:
    """The vectors of all images that could be decoded; images of equal content or equal vectors share a row."""

    records: list[ImageRecord]
    rows: np.ndarray  # [n] int64: for each record its row in `vectors`
    vectors: np.ndarray  # [u, d] float32, L2-normalised if the settings say so
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
    keys = [_row_key(record, scanned.value_range) for record in scanned.records]
    wanted = {key: row for row, key in enumerate(dict.fromkeys(keys))}
    jobs = _jobs(scanned, keys, wanted)
    vectors, found = _from_cache(cache, wanted)
    missing = [job for job in jobs if not found[job.row]]
    reasons: dict[int, str] = {}
    if missing:
        vectors = _compute(missing, vectors, settings, identity, cache, reasons, len(wanted), progress)
    features = _assemble(scanned, keys, wanted, vectors, reasons, int(found.sum()))
    if settings.preprocessing.l2_normalize:
        _normalize_in_place(features.vectors)
    features = _merge_equal(features)
    log.info(
        "features: %d of %s, %d from the cache, %d computed, %d unreadable, %.1f s",
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


def _row_key(record: ImageRecord, value_range: tuple[float, float] | None) -> str:
    """Content hash; images of more than 8 bits depend on the range of the data set too."""
    if not record.is_deep or value_range is None:
        return record.sha256
    return f"{record.sha256}@{value_range[0]!r}:{value_range[1]!r}"


def _jobs(scanned: ScannedImages, keys: list[str], wanted: dict[str, int]) -> list[Job]:
    first: dict[str, ImageRecord] = {}
    for key, record in zip(keys, scanned.records, strict=True):
        first.setdefault(key, record)
    return [Job(row, key, first[key].path, scanned.value_range) for key, row in wanted.items()]


def _from_cache(cache: FeatureCache | None, wanted: dict[str, int]) -> tuple[np.ndarray | None, np.ndarray]:
    """The matrix with the rows that the cache has filled in, and which they are; no matrix where it has none."""
    dimension = cache.dimension() if cache else None
    if cache is None or dimension is None:
        return None, np.zeros(len(wanted), bool)
    vectors = np.zeros((len(wanted), dimension), np.float32)
    return vectors, cache.read_into(vectors, wanted)


def _compute(
    missing: Sequence[Job],
    vectors: np.ndarray | None,
    settings: ImageSettings,
    identity: ModelIdentity,
    cache: FeatureCache | None,
    reasons: dict[int, str],
    n_rows: int,
    progress: bool,
) -> np.ndarray:
    """Fill the missing rows; unreadable ones get an entry in `reasons`."""
    extractor = make_extractor(settings.model, identity)
    if vectors is None:
        vectors = np.zeros((n_rows, extractor.dimension), np.float32)
    n_workers = n_workers_of(settings.model.num_workers)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(cache.writer(extractor.dimension)) if cache else None
        bar = stack.enter_context(Progress(len(missing), label="features", unit="images", enabled=progress))
        if isinstance(extractor, HogExtractor):
            batches = describe_ahead(missing, settings, n_workers)
        else:
            batches = _embedded(missing, settings, n_workers, extractor.embed)
        for outcome in batches:
            if outcome.array is None or not np.isfinite(outcome.array).all():
                reasons[outcome.job.row] = outcome.reason or "the network gave a vector that is not finite"
            else:
                vectors[outcome.job.row] = outcome.array
                if writer:
                    writer.add(outcome.job.key, outcome.array)
            bar.update(1)
    return vectors


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
    keys: list[str],
    wanted: dict[str, int],
    vectors: np.ndarray | None,
    reasons: dict[int, str],
    n_cached: int,
) -> Features:
    """Drop the rows that could not be computed, so that every row left is an image and none is shifted."""
    old_rows = np.array([wanted[key] for key in keys], np.int64)  # [n]
    good = np.ones(len(wanted), bool)
    good[list(reasons)] = False
    records = [record for record, row in zip(scanned.records, old_rows, strict=True) if good[row]]
    undecoded = [
        BadImage(record.path, record.relative_path, reasons[int(row)])
        for record, row in zip(scanned.records, old_rows, strict=True)
        if not good[row]
    ]
    if vectors is None or not records:
        first = (scanned.bad + undecoded)[0]
        raise UserError(
            f"none of the {len(scanned.bad) + len(undecoded)} files is an image that can be read; the first is "
            f"{first.relative_path}: {first.reason}"
        )
    new_rows = np.cumsum(good) - 1
    return Features(
        records=records,
        rows=new_rows[old_rows[good[old_rows]]],
        vectors=_keep_rows(vectors, good),
        bad=sorted(scanned.bad + undecoded, key=lambda bad: bad.relative_path),
        value_range=scanned.value_range,
        n_cached=n_cached,
        n_computed=len(wanted) - n_cached - len(reasons),
    )


def _merge_equal(features: Features) -> Features:
    """Let files of other bytes but equal vectors, such as the same picture with other EXIF, share one row."""
    first: dict[bytes, int] = {}
    merged = np.empty(len(features.vectors), np.int64)  # for each row its new one
    keep = np.zeros(len(features.vectors), bool)
    for row, vector in enumerate(features.vectors):
        digest = hashlib.blake2b(vector.tobytes(), digest_size=16).digest()
        keep[row] = digest not in first
        merged[row] = first.setdefault(digest, len(first))
    return replace(features, rows=merged[features.rows], vectors=_keep_rows(features.vectors, keep))


def _keep_rows(matrix: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The kept rows, moved up in place: a copy of the matrix would double the memory."""
    if keep.all():
        return matrix
    kept = np.flatnonzero(keep)
    for start in range(0, len(kept), 1024):
        part = kept[start : start + 1024]
        matrix[start : start + len(part)] = matrix[part]
    return matrix[: len(kept)]


def _normalize_in_place(vectors: np.ndarray) -> None:
    for start in range(0, len(vectors), 4096):
        part = vectors[start : start + 4096]
        lengths = np.linalg.norm(part.astype(np.float64), axis=1, keepdims=True)
        part /= np.maximum(lengths, 1e-12).astype(np.float32)

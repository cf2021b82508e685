"""Images made ready for the network by workers that run ahead of it: decoded and preprocessed, or described by HOG.

    for outcome in prepare_ahead(jobs, settings, n_workers):
        outcome.array            # planes [p, s, s, c] uint8, or None and outcome.reason

Outcomes come in the order of the jobs, however many workers there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from common.config import UserError
from image_parts.decode import UnreadableImage, decode_image, read_content
from image_parts.extractors import HogExtractor
from image_parts.preprocess import needed_size, prepare_image
from image_parts.settings import ImageSettings, ModelSettings, PreprocessingSettings

# Images in one task of a worker: enough to outweigh handing it over.
_TASK_IMAGES = 8
# Below this many images worker processes would take longer to start than they save.
_MIN_IMAGES_FOR_PROCESSES = 256

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """One image content that has to be computed."""

    row: int
    key: str
    path: Path
    value_range: tuple[float, float] | None


@dataclass(frozen=True)
class Outcome:
    """A job done: prepared planes [p, s, s, c] uint8 or a vector [d] float32, or the reason why there is none."""

    job: Job
    array: np.ndarray | None
    reason: str | None = None


def prepare_ahead(jobs: Sequence[Job], settings: ImageSettings, n_workers: int) -> Iterator[Outcome]:
    """Decoded and preprocessed images in the order of the jobs, made by threads ahead of whoever takes them.

    OpenCV and Pillow let other threads run while they work.
    """
    prepare = partial(_prepare_all, settings=(settings.preprocessing, settings.model.image_size))
    with ThreadPoolExecutor(n_workers) as executor:
        for outcomes in map_ahead(prepare, _chunks(jobs, _TASK_IMAGES), executor, n_ahead=2 * n_workers + 2):
            yield from outcomes


def describe_ahead(jobs: Sequence[Job], settings: ImageSettings, n_workers: int) -> Iterator[Outcome]:
    """HOG holds the interpreter lock, so it runs in processes, together with the decoding."""
    describe = partial(_describe_all, settings=(settings.preprocessing, settings.model))
    if n_workers == 1 or len(jobs) < _MIN_IMAGES_FOR_PROCESSES:
        for chunk in _chunks(jobs, _TASK_IMAGES):
            yield from describe(chunk)
        return
    from joblib.externals.loky import get_reusable_executor
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    executor = get_reusable_executor(max_workers=n_workers)
    try:
        for outcomes in map_ahead(describe, _chunks(jobs, 4 * _TASK_IMAGES), executor, n_ahead=2 * n_workers + 2):
            yield from outcomes
    except TerminatedWorkerError:
        raise UserError(
            "a worker process that decodes images died (out of memory?); set model.num_workers=1 and start again: "
            "what was computed is kept"
        ) from None
    finally:
        executor.shutdown(wait=True)


def map_ahead(
    task: Callable[[Item], Result], items: Iterable[Item], executor: Executor, *, n_ahead: int
) -> Iterator[Result]:
    """Results in the order of the items, at most `n_ahead` of them computed before they are asked for."""
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(task, item))
            if len(pending) >= n_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _prepare_all(jobs: Sequence[Job], *, settings: tuple[PreprocessingSettings, int]) -> list[Outcome]:
    return [_prepare(job, *settings) for job in jobs]


def _describe_all(jobs: Sequence[Job], *, settings: tuple[PreprocessingSettings, ModelSettings]) -> list[Outcome]:
    preprocessing, model = settings
    extractor = _hog_of(model)
    outcomes = [_prepare(job, preprocessing, model.image_size) for job in jobs]
    return [
        outcome if outcome.array is None else Outcome(outcome.job, extractor.embed(outcome.array[None])[0])
        for outcome in outcomes
    ]


@lru_cache(maxsize=1)
def _hog_of(settings: ModelSettings) -> HogExtractor:
    return HogExtractor(settings)


def _prepare(job: Job, preprocessing: PreprocessingSettings, image_size: int) -> Outcome:
    import cv2

    cv2.setNumThreads(1)  # the workers are the parallelism; OpenCV's own threads on top would only wait
    try:
        at_least = needed_size(preprocessing, image_size=image_size)
        pixels = decode_image(read_content(job.path), value_range=job.value_range, at_least=at_least)
    except UnreadableImage as problem:
        return Outcome(job, None, str(problem))
    return Outcome(job, prepare_image(pixels, preprocessing, image_size=image_size))


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))

"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.text_pipeline import STAGE_NAMES, TextPipeline


@pytest.fixture(scope="session")
def finished_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextPipeline]:
    """The six text stages on tiny input, each run once; the state after each stage is saved under its name."""
    pipeline = TextPipeline(tmp_path_factory.mktemp("text_pipeline"))
    try:
        pipeline.restore("empty")
        for stage in STAGE_NAMES:
            pipeline.run_all([stage])
            pipeline.save(stage)
        yield pipeline
    finally:
        pipeline.close()


@pytest.fixture
def pipeline(finished_pipeline: TextPipeline) -> TextPipeline:
    """The same, with the work folder as it is after the last stage."""
    finished_pipeline.restore(STAGE_NAMES[-1])
    return finished_pipeline


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent

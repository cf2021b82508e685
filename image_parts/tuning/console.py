"""What a search says while it runs: a line for each evaluation, or for each that is better than all before."""

from __future__ import annotations

import logging

from image_parts.tuning.evaluate import Evaluation
from image_parts.tuning.settings import TuningSettings

log = logging.getLogger(__name__)


class Console:
    """Tells evaluations as the settings wish; `compact` tells the first few, better ones and failures."""

    def __init__(self, tuning: TuningSettings) -> None:
        self._is_full = tuning.console_verbosity == "full"
        self._n_detailed = tuning.detailed_first_n_iters
        self._best: dict[int, float] = {}  # by phase
        self.n_evaluated = 0  # in this run
        self._taken_up: set[int] = set()  # iterations of an earlier run; told twice where a journal is made anew

    @property
    def n_taken_up(self) -> int:
        """Evaluations of an earlier run."""
        return len(self._taken_up)

    def tell(self, evaluation: Evaluation, was_there: bool) -> None:
        """Tell one evaluation; `was_there` says that an earlier run made it."""
        self.n_evaluated += not was_there
        best = self._best.get(evaluation.phase, float("-inf"))
        is_better = evaluation.score is not None and evaluation.score > best
        if evaluation.score is not None:
            self._best[evaluation.phase] = max(best, evaluation.score)
        if was_there:
            self._taken_up.add(evaluation.iteration)
            return
        if evaluation.error:
            log.warning("%s failed: %s; %s", _name(evaluation), evaluation.error, format_choice(evaluation))
        elif self._is_full or self.n_evaluated <= self._n_detailed:
            log.info("%s: %s; %s, %.2f s", _name(evaluation), format_metrics(evaluation), format_choice(evaluation),
                     evaluation.seconds)  # fmt: skip
        elif is_better:
            log.info("%s: best so far, score %.4f, %s", _name(evaluation), evaluation.score, evaluation.verdict)


def format_metrics(evaluation: Evaluation) -> str:
    """Score, verdict and measures in a line."""
    metrics = evaluation.metrics

    def shown(name: str, digits: int = 3) -> str:
        value = metrics.get(name)
        return "none" if value is None else f"{value:.{digits}f}"

    return (
        f"score {evaluation.score:.4f} {evaluation.verdict}, {int(metrics['n_clusters'] or 0)} clusters, centroid "
        f"cosine {shown('max_centroid_cosine')}, silhouette {shown('silhouette')}, cross ratio "
        f"{shown('max_nn_cross_ratio')}, noise {shown('noise_share')}, largest {shown('largest_share')}"
    )


def format_choice(evaluation: Evaluation) -> str:
    """The values that were searched."""
    return ", ".join(f"{name.partition('.')[2]}={value}" for name, value in evaluation.choice.items())


def _name(evaluation: Evaluation) -> str:
    return f"iteration {evaluation.iteration}" + (" (sample)" if evaluation.phase == 1 else "")

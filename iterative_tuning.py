"""From config.yaml to a better config.yaml: many reductions, clusterings and purity checks, ranked.

Reads the config.yaml of image_cluster.py with its section `tuning`, and the images. Writes to output_dir: best.yaml,
which image_cluster.py runs as it is, top_configs/, tuning_summary_latest.json, tuning_results_all.csv,
tuning_report.html with plots/, the best candidates drawn in full in top/, and every evaluation in _tuning/<iteration>/.
Killed and started again, it goes on where it stopped.

    python iterative_tuning.py --config config.yaml input_dir=photos output_dir=runs/tuning
    python iterative_tuning.py --config config.yaml input_dir=photos output_dir=runs/tuning --reproduce 17
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import sys
from pathlib import Path
from typing import Any

from common import cli
from common.backend import choose_backend
from common.cli import Stopwatch
from common.commit import Identity, OutputLock, describe_changes, remove_stale_temporaries, write_json
from common.config import ConfigError, UserError
from image_parts.extractors import identify_model
from image_parts.scan import ScannedImages, check_folders, list_images, n_workers_of, scan_images
from image_parts.settings import ImageSettings
from image_parts.tables import identify_run
from image_parts.tuning.console import Console, format_choice, format_metrics
from image_parts.tuning.finish import draw_best, reproduce, score_against_truth
from image_parts.tuning.outputs import (
    BEST,
    RESULTS,
    SUMMARY,
    TOP,
    TOP_CONFIGS,
    summarize,
    write_configs,
    write_results,
    write_summary,
)
from image_parts.tuning.records import Records
from image_parts.tuning.report import PLOTS, REPORT, draw_plots, parameter_importances, write_report
from image_parts.tuning.space import SearchSpace, flat_settings, read_space
from image_parts.tuning.stability import Stability, measure_stability
from image_parts.tuning.tuner import SearchResult, search_candidates

log = logging.getLogger(__name__)

Settings = ImageSettings

TUNING_DIR = "_tuning"
RUN_JSON = "run.json"
# Keys of `tuning` that change no number of the result, or only how much of it there is.
_FREE_KEYS = ("n_jobs", "timeout_s", "console_verbosity", "detailed_first_n_iters")


def check(settings: ImageSettings) -> dict[str, Any]:
    """Validate folders, model and search space; returns the plan."""
    space = read_tunable_space(settings)
    input_dir, output_dir = check_folders(settings.input_dir, settings.output_dir)
    identify_model(settings.model)
    n_images, n_bytes = list_images(input_dir, extensions=settings.image_extensions)
    counts = {parameter.name: len(parameter.values) for parameter in space.parameters}
    n_embeddings = math.prod(count for name, count in counts.items() if not name.startswith("clustering."))
    return {
        "images": n_images,
        "bytes": n_bytes,
        "strategy": settings.tuning.search_strategy,
        "points": space.n_points,
        "parameters": counts,
        "max_evaluations": min(settings.tuning.max_evaluations, space.n_points),
        "embeddings_at_most": n_embeddings,
        "two_phases": settings.tuning.two_phase_enabled,
        "output_dir": str(output_dir),
    }


def run(settings: ImageSettings, *, overwrite: bool = False, iteration: int | None = None) -> dict[str, Any]:
    """Search, rank, check the best for stability, and write configs, tables, pictures and a page; or reproduce one."""
    watch = Stopwatch()
    space = read_tunable_space(settings)
    input_dir, output_dir = check_folders(settings.input_dir, settings.output_dir)
    with OutputLock(output_dir):
        scanned = scan(settings, input_dir)
        if iteration is not None:
            backend = choose_backend(settings.acceleration.backend)
            return reproduce(output_dir / TUNING_DIR, iteration, scanned, backend=backend)
        identity = identify_tuning(scanned, settings, space)
        finished = begin(output_dir, identity, settings, overwrite=overwrite)
        if finished is not None:
            log.info("nothing changed since the last run: its result in %s stands", output_dir)
            return tell_result(finished, output_dir)
        backend = choose_backend(settings.acceleration.backend)
        warn_of_other_features(space)
        console = Console(settings.tuning)
        found = search_candidates(
            space,
            scanned,
            Records(output_dir / TUNING_DIR),
            backend=backend,
            stage_root=stage_root(settings, output_dir),
            tell=console.tell,
        )
        log.info("%d evaluations, %d of them by an earlier run", len(found.evaluations), console.n_taken_up)
        write_results(found, output_dir=output_dir)
        refuse_nothing(found, output_dir)
        stability = measure_stability(found.ranking[: settings.tuning.stability_top_n], space, found.samples)
        tell_best(found, stability)
        truth = score_against_truth(found.ranking[0], space, found.samples, scanned, input_dir=input_dir)
        importances = parameter_importances(found.whole.evaluations, space)
        summary = summarize(found, stability, space, identity=identity.to_dict(), importances=importances, truth=truth)
        write_configs(found.ranking, space, output_dir=output_dir)
        draw_plots(found, space, importances, folder=output_dir / PLOTS)
        write_report(found, stability, space, summary, output_dir=output_dir)
        draw_best(found.ranking, space, scanned, backend=backend, output_dir=output_dir)
        write_summary(summary, output_dir=output_dir)
    log.info("done in %.1f s: %s", watch.seconds, output_dir)
    return tell_result(summary, output_dir)


def read_tunable_space(settings: ImageSettings) -> SearchSpace:
    """The search space; raises ConfigError where it is wrong, or where results could not be repeated."""
    space = read_space(settings)
    seeds = [parameter.values for parameter in space.parameters if parameter.name == "reduction.random_state"]
    if None in (seeds[0] if seeds else (settings.reduction.random_state,)):
        raise ConfigError("reduction.random_state is null, so that no evaluation could be repeated; set a number")
    return space


def scan(settings: ImageSettings, input_dir: Path) -> ScannedImages:
    """The images, from the index of the cache where size and time of a file are as they were."""
    return scan_images(
        input_dir,
        extensions=settings.image_extensions,
        cache_dir=Path(settings.cache.cache_dir) if settings.cache.enabled else None,
        n_workers=n_workers_of(settings.model.num_workers),
        progress=settings.progress,
    )


def stage_root(settings: ImageSettings, output_dir: Path) -> Path:
    """Where embeddings are kept: in the cache, which several runs share, or else with the run."""
    return Path(settings.cache.cache_dir) / "tuning" if settings.cache.enabled else output_dir / TUNING_DIR / "stages"


# --- One run and the next --------------------------------------------------------------------------------------------


def identify_tuning(scanned: ScannedImages, settings: ImageSettings, space: SearchSpace) -> Identity:
    """What the result depends on: images, model, all keys of a candidate, the space and how it is searched.

    With one phase, more evaluations continue what fewer began.
    """
    of_images = identify_run(scanned, settings, identify_model(settings.model))
    keys = {
        name: value for name, value in of_images.keys.items() if not name.startswith(("visualization.", "exports."))
    }
    keys |= {name: value for name, value in flat_settings(settings).items() if name not in keys}
    tuning = settings.tuning.model_dump(mode="json", exclude=set(_FREE_KEYS))
    if not settings.tuning.two_phase_enabled:
        del tuning["max_evaluations"]
    tuning["search_space"] = {parameter.name: list(parameter.values) for parameter in space.parameters}
    keys |= {f"tuning.{name}": value for name, value in tuning.items()}
    for name in ("model.batch_size", "model.device", "model.num_workers"):
        keys.pop(name, None)
    return Identity("iterative_tuning", keys, of_images.inputs)


def begin(output_dir: Path, identity: Identity, settings: ImageSettings, *, overwrite: bool) -> dict[str, Any] | None:
    """Make the folder ready for this run, new or continued; returns the summary where there is nothing left to do.

    Raises UserError, naming what changed, where another configuration wrote there and `overwrite` is off.
    """
    path = output_dir / TUNING_DIR / RUN_JSON
    for folder in (
        output_dir,
        path.parent,
        output_dir / PLOTS,
        output_dir / TOP_CONFIGS,
        *output_dir.glob(f"{TOP}/**"),
    ):
        if folder.is_dir():
            remove_stale_temporaries(folder)
    before = _read_json(path)
    if before is not None and before.get("identity") != identity.to_dict():
        if not overwrite:
            changes = describe_changes(before.get("identity", {}), identity.to_dict())
            raise UserError(f"{output_dir} holds another tuning ({changes}); give --overwrite or another output_dir")
        log.info("--overwrite: the tuning in %s is replaced", output_dir)
        clear(output_dir)
        before = None
    if before is None:
        clear_tuning(output_dir)  # evaluations that nobody knows the settings of
        write_json(path, {"identity": identity.to_dict(), "settings": settings.model_dump(mode="json")})
        return None
    summary = _read_json(output_dir / SUMMARY)
    if summary is None or not summary["complete"] or summary["identity"] != identity.to_dict():
        return None
    asked = settings.tuning.max_evaluations
    return summary if summary["settings"]["tuning"]["max_evaluations"] == asked else None


def clear(output_dir: Path) -> None:
    """Remove what a tuning run wrote, and nothing else; the summary first, and what tells whose it was last."""
    for name in (SUMMARY, BEST, RESULTS, REPORT):
        (output_dir / name).unlink(missing_ok=True)
    for name in (PLOTS, TOP, TOP_CONFIGS):
        if (output_dir / name).is_dir():
            shutil.rmtree(output_dir / name)
    clear_tuning(output_dir)


def clear_tuning(output_dir: Path) -> None:
    """Remove the evaluations; run.json goes last, so that leftovers are never taken for others."""
    folder = output_dir / TUNING_DIR
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != RUN_JSON:
            path.unlink()
    (folder / RUN_JSON).unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path} is damaged; remove it, or give --overwrite another output_dir") from None
    return dict(values)


# --- What is told ----------------------------------------------------------------------------------------------------


def warn_of_other_features(space: SearchSpace) -> None:
    """Say so where candidates have features of their own: scores from two feature spaces compare only roughly."""
    names = [p.name for p in space.parameters if p.name.startswith(("model.", "preprocessing."))]
    if names:
        log.warning(
            "%s: each value has features of its own, in which its candidates are measured; a higher score may come "
            "from the features alone, so look at the pictures of the best, or give purity.truth", ", ".join(names),
        )  # fmt: skip


def refuse_nothing(found: SearchResult, output_dir: Path) -> None:
    """Raise UserError where no evaluation succeeded."""
    if found.ranking:
        return
    errors = [evaluation.error for evaluation in found.whole.evaluations if evaluation.error]
    if errors:
        raise UserError(
            f"all {len(found.whole.evaluations)} evaluations failed; the first error: {errors[0]}; all of them are in "
            f"{output_dir / RESULTS}"
        )
    reasons = "; ".join(found.whole.skipped)
    raise UserError(f"no combination of tuning.search_space fits together, so nothing was evaluated: {reasons}")


def tell_best(found: SearchResult, stability: dict[int, Stability]) -> None:
    """Log the best candidate, what seeds do to it, and how far phase 1 could be trusted."""
    best = found.ranking[0]
    log.info("best: iteration %d, %s; %s", best.iteration, format_metrics(best), format_choice(best))
    if found.sample is not None:
        shown = "unknown" if found.rank_correlation is None else f"{found.rank_correlation:.2f}"
        log.info("rank correlation of phase 1 and phase 2: %s (%d candidates)", shown, found.n_pairs)
    for evaluation in found.ranking:
        repeated = stability.get(evaluation.iteration)
        if repeated is not None:
            verdict = "stable" if repeated.is_stable else "FLIPPED BY A SEED"
            log.info("iteration %d with %d other seeds: least ARI %.3f, %s", evaluation.iteration, len(repeated.seeds),
                     min(repeated.aris), verdict)  # fmt: skip


def tell_result(summary: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """The last line on stdout."""
    best = summary["best"]
    return {
        "output_dir": str(output_dir),
        "best_config": str(output_dir / BEST),
        "n_evaluations": summary["n_evaluations"],
        "n_failed": summary["n_failed"],
        "complete": summary["complete"],
        **{name: best[name] for name in ("iteration", "score", "verdict", "metrics", "choice")},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this script takes on top of the arguments that all scripts share."""
    parser.add_argument(
        "--reproduce", dest="iteration", type=int, metavar="ITERATION", help="compute one iteration anew and compare"
    )


if __name__ == "__main__":
    sys.exit(
        cli.main(
            ImageSettings,
            run,
            doc=__doc__,
            section=None,
            check=check,
            add_arguments=add_arguments,
            default_config="config.yaml",
        )
    )

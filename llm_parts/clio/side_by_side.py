"""The same data gone through again by other models, prompts or temperatures, to see what they change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_parts.clio.base_names import BaseNames
from llm_parts.clio.comparison import compare_hierarchies
from llm_parts.clio.conversations import Conversation
from llm_parts.clio.facets import FacetTable, extract_facets
from llm_parts.clio.hierarchy_llm import build_llm_hierarchy
from llm_parts.clio.inspection import Inspection, dialogue_of, notes_of
from llm_parts.clio.judges import judge_scores, score_rows
from llm_parts.clio.masking import Masker
from llm_parts.clio.measures import mean_agreement
from llm_parts.clio.models import Models
from llm_parts.clio.naming import Namer
from llm_parts.clio.parent_names import Questions, as_texts
from llm_parts.clio.settings import ClioSettings, Extractor
from llm_parts.clio.taxonomy import ClusterName, Hierarchy, base_paths, count_sizes

Embed = Callable[[Sequence[str]], np.ndarray]  # texts -> [n, d] float32, unit rows
Row = dict[str, Any]

EXTRACTION_STEP = "compare_facets"
SAMPLING_STEP = "cluster_name_sampling"


# --- Models and prompts that extract facets --------------------------------------------------------------------------


def compare_extractors(
    conversations: Sequence[Conversation],
    facets: FacetTable,
    *,
    settings: ClioSettings,
    models: Models,
    inspection: Inspection,
    embed: Embed,
) -> list[Row]:
    """A table row for the run's own facets of sampled dialogues, and one for those of each other extractor.

    All are scored by the same judges; `similarity` is the mean cosine of the first facet with that of the run.
    """
    if not settings.extractors or not inspection.judges:
        return []
    places = inspection.sample(facets.has_facets(), draw=0)
    sampled = [conversations[place] for place in places]
    ours = facets.take(places)
    rows = [_extractor_row(Extractor().label(models.llm), settings, sampled, ours, ours, inspection, embed)]
    for choice in settings.extractors:
        changed = settings.model_copy(
            update={
                "facet_prompt": choice.facet_prompt or settings.facet_prompt,
                "temperature": settings.temperature if choice.temperature is None else choice.temperature,
            }
        )
        theirs = extract_facets(sampled, client=models.client(choice), settings=changed, step=EXTRACTION_STEP)
        rows.append(_extractor_row(choice.label(models.llm), changed, sampled, theirs, ours, inspection, embed))
    return rows


def _extractor_row(
    name: str,
    settings: ClioSettings,
    sampled: Sequence[Conversation],
    facets: FacetTable,
    ours: FacetTable,
    inspection: Inspection,
    embed: Embed,
) -> Row:
    answered = facets.has_facets()
    items = [(dialogue_of(sampled[row]), notes_of(facets, row)) for row in answered]
    # Of all judges together: what they say one by one stands in the table of the judges.
    kind = "facets" if facets is ours else "extraction"
    verdicts = judge_scores(items, kind=kind, judges=inspection.judges)
    verdicts.by_judge = {"all": [score for scores in verdicts.by_judge.values() for score in scores]}
    scored = score_rows(verdicts)[0]
    main = settings.facets[0].name
    pairs = [embed([str(table.columns[main][row]) for row in answered]) for table in (facets, ours)]
    return {
        "model": name,
        "prompt": settings.facet_prompt,
        "dialogues": len(sampled),
        "quarantined": facets.n_quarantined,
        "did_not_fit": sum(facets.unfit.values()),
        **{key: scored[key] for key in ("mean_score", "low_score", "high_score", "scored_4_or_5")},
        "similarity": round(float((pairs[0] * pairs[1]).sum(axis=1).mean()), 4) if answered else None,
    }


# --- Temperature and top_p -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Taxonomy:
    """Names of base clusters and the hierarchy over them."""

    names: list[ClusterName]
    hierarchy: Hierarchy


def sweep_sampling(
    base: BaseNames,
    hierarchy: Hierarchy,
    *,
    settings: ClioSettings,
    models: Models,
    embed: Embed,
    true_labels: Sequence[Any] | None,
) -> list[Row]:
    """A table row for the run's own taxonomy, and one for each temperature and top_p of `sampling_sweep`.

    The base clusters stay; their names and the hierarchy by LLM are made anew.
    """
    variants = settings.sampling_sweep.variants()
    if not variants or base.n_clusters == 0:
        return []
    ours = _Taxonomy(base.names, hierarchy)
    rows = [_sampling_row(settings, models, ours, ours, base, embed, true_labels)]
    for values in variants:
        changed = settings.model_copy(update=values)
        questions = Questions(models.main, changed)
        masker = Masker(enabled=settings.mask, names=settings.mask_names)
        namer = Namer(questions, method=settings.naming, masker=masker, step=SAMPLING_STEP)
        names = namer.name_clusters(base.evidence)
        sizes = count_sizes(base.labels, n_clusters=base.n_clusters)
        built = build_llm_hierarchy(names, sizes, client=models.main, settings=changed, embed=embed)
        rows.append(_sampling_row(changed, models, _Taxonomy(names, built), ours, base, embed, true_labels))
    return rows


def _sampling_row(
    settings: ClioSettings,
    models: Models,
    made: _Taxonomy,
    ours: _Taxonomy,
    base: BaseNames,
    embed: Embed,
    true_labels: Sequence[Any] | None,
) -> Row:
    cosines = (embed(as_texts(made.names)) * embed(as_texts(ours.names))).sum(axis=1)
    compared = compare_hierarchies([made.hierarchy], base_labels=base.labels, true_labels=true_labels, centroids=None)
    top = compared[0] if compared else {}
    return {
        "temperature": models.llm.temperature if settings.temperature is None else settings.temperature,
        "top_p": models.llm.top_p if settings.top_p is None else settings.top_p,
        "names_kept": round(float(np.mean([a.name == b.name for a, b in zip(made.names, ours.names, strict=True)])), 4),
        "name_similarity": round(float(cosines.mean()), 4),
        "top_clusters": top.get("n_clusters"),
        "top_agreement": round(mean_agreement([_tops(made, base), _tops(ours, base)]), 4),
        "top_label_purity": top.get("label_purity"),
        "top_label_nmi": top.get("label_nmi"),
    }


def _tops(taxonomy: _Taxonomy, base: BaseNames) -> np.ndarray:
    """The top cluster of each conversation that is in one."""
    top = base_paths(taxonomy.hierarchy, n_base=base.n_clusters)[0]
    return top[base.labels[base.labels >= 0]]

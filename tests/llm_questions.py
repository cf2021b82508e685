"""Questions and a client for the tests of the LLM client."""

from __future__ import annotations

from llm_parts.client import LlmClient, LlmRequest
from llm_parts.schemas import JudgeAnswer, MergeAnswer

SAME = {"reasoning": "one procedure", "decision": "same"}


def same(name, messages, schema):
    return SAME


def question(number=0, **keys):
    messages = [{"role": "system", "content": "Compare."}, {"role": "user", "content": f"pair {number}"}]
    return LlmRequest(messages, MergeAnswer, "merge", step="merge", **keys)


def decision(cluster_id="c-1", **changes):
    kept = {"request_id": "r1", "decision": "assign", "cluster_id": cluster_id, "confidence": 0.9, "rationale": "fits"}
    return {"decisions": [{**kept, **changes}]}


def judge_question(text="my card is lost"):
    messages = [{"role": "user", "content": text}]
    return LlmRequest(messages, JudgeAnswer, "judge", step="judge", choices={"cluster_id": ["c-1", "c-2"]})


def client_of(server, provider="triton", **keys):
    """A client of the lightest wire; the policy is the same over all."""
    options = {name: keys.pop(name) for name in ("prompts_path", "default_cache_path") if name in keys}
    return LlmClient(server.settings(provider, **keys), **options)

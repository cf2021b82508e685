"""A scripted brain for LlmServer that knows the true label of every text, and is wrong on demand.

It reads prompts as a model would: only what stands in the tags counts. Clusters that it proposes carry their label in
their criteria, and bear another name each time, so that they must be merged by what they mean.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from llm_parts.wires.base import BaseLLMProvider

WORDINGS = ("{}", "{} requests", "Questions on {}", "{} problem", "Customer asks: {}")


def read_tag(prompt: str, tag: str) -> list[dict[str, Any]]:
    """The JSON list of the one tag of that name; fails where a text broke out of its tag."""
    found = re.findall(f"<{tag}>(.*?)</{tag}>", prompt, re.DOTALL)
    if not found:
        return []
    assert len(found) == 1, f"{len(found)} tags <{tag}>"
    return json.loads(found[0])


class TruthBrain:
    """Answers every schema by the true labels; `wrong` is the share of judgements that it gets wrong."""

    def __init__(
        self, label_of: Mapping[str, str], *, wrong: float = 0.0, seed: int = 0, distinct_names: bool = True
    ) -> None:
        self.label_of = {text.strip(): label for text, label in label_of.items()}
        self.wrong = wrong
        self.seed = seed
        self.distinct_names = distinct_names

    def __call__(self, schema_name: str, messages: list[dict[str, str]], schema: Any) -> dict[str, Any]:
        prompt = messages[-1]["content"] if messages[-1]["role"] == "user" else messages[0]["content"]
        users = [message["content"] for message in messages if message["role"] == "user"]
        prompt = users[0]
        self._draw = hashlib.sha256(f"{self.seed} {len(messages)} {prompt}".encode()).digest()
        return getattr(self, schema_name)(read_tag(prompt, "requests"), read_tag(prompt, "clusters"), prompt)

    def label(self, request: dict[str, Any]) -> str:
        return self.label_of.get(request["text"].strip(), "unknown")

    def cluster_label(self, cluster: dict[str, Any]) -> str:
        return cluster["criteria"].removeprefix("label: ")

    def proposer(self, requests: list[Any], clusters: list[Any], prompt: str) -> dict[str, Any]:
        known = {self.cluster_label(cluster) for cluster in clusters}
        groups: dict[str, list[str]] = {}
        for request in requests:
            groups.setdefault(self.label(request), []).append(request["request_id"])
        limit = int(re.search(r"(\d+) at most", prompt)[1])
        proposed = []
        for label, ids in sorted(groups.items(), key=lambda pair: -len(pair[1])):
            if label not in known:
                number = hashlib.sha256(f"{label} {ids}".encode()).digest()[0]
                wording = WORDINGS[number % len(WORDINGS)] if self.distinct_names else "{}"
                name = wording.format(label.replace("_", " "))
                proposed.append({"name": name, "summary": "", "criteria": f"label: {label}", "request_ids": ids})
        return {"reasoning": "by label", "clusters": proposed[:limit]}

    def judge(self, requests: list[Any], clusters: list[Any], prompt: str) -> dict[str, Any]:
        decisions = []
        for place, request in enumerate(requests):
            right = [c["cluster_id"] for c in clusters if self.cluster_label(c) == self.label(request)]
            draw = hashlib.sha256(self._draw + bytes([place % 256])).digest()
            if int.from_bytes(draw[:8], "big") / 2**64 < self.wrong:
                others = [c["cluster_id"] for c in clusters if c["cluster_id"] not in right] or [None]
                chosen = others[draw[9] % len(others)]
            else:
                chosen = right[0] if right else None
            decisions.append(
                {
                    "request_id": request["request_id"],
                    "decision": "assign" if chosen else "new_cluster",
                    "cluster_id": chosen,
                    "confidence": 0.9,
                    "rationale": "by label",
                }
            )
        return {"decisions": decisions}

    def merge(self, requests: list[Any], clusters: list[Any], prompt: str) -> dict[str, Any]:
        first, second = (self.cluster_label(cluster) for cluster in clusters)
        same = first == second
        if int.from_bytes(self._draw[8:16], "big") / 2**64 < self.wrong:
            same = not same
        return {"reasoning": "by label", "decision": "same" if same else "different"}

    def cohesion(self, requests: list[Any], clusters: list[Any], prompt: str) -> dict[str, Any]:
        wanted = self.cluster_label(clusters[0])
        share = sum(self.label(request) == wanted for request in requests) / len(requests)
        return {"reasoning": "by label", "score": 1 + round(4 * share)}

    def name_check(self, requests: list[Any], clusters: list[Any], prompt: str) -> dict[str, Any]:
        label = self.label(requests[0]).replace("_", " ")
        chosen = [cluster["cluster_id"] for cluster in clusters if label in cluster["name"]]
        return {"cluster_id": chosen[0] if chosen else None}


class BrainProvider(BaseLLMProvider):
    """The brain as a user's own provider, for tests that need no wire."""

    def __init__(self, brain: TruthBrain) -> None:
        self.brain = brain
        self.prompts: list[list[dict[str, str]]] = []

    def chat_completion(self, messages: Any, temperature: Any = None, max_tokens: Any = None) -> str:
        self.prompts.append(messages)
        name = re.search(r"schema: (\w+)", messages[0]["content"])[1]
        return json.dumps(self.brain(name, messages, None), ensure_ascii=False)

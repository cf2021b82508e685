"""A run of mode clio that dies where it is told to, for tests that start it again and again; see stage_server.py.

`die_at.json` beside the input says where: {"answers": 12} before the thirteenth answer that was ever given for this
input, {"file": "map.png"} as that file is about to get its name, {} nowhere. Every answer is written to `answers.log`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from clio_brain import BrainProvider, ClioBrain, wording_in
from clio_dialogues import TOPICS

from llm_parts.clio.pipeline import run_clio
from llm_parts.clio.settings import ClioSettings
from llm_parts.settings import LlmSettings

# One call at a time, so that an answer is kept before the next question is asked.
LLM = LlmSettings(provider="ollama", concurrency=1)

Settings = ClioSettings


class TerseBrain(ClioBrain):
    """Words all dialogues on a topic alike: four topics make four places, which need no UMAP and its compilation."""

    def facets(self, tags: dict[str, Any], prompt: str, draw: int) -> dict[str, Any]:
        topic = wording_in(" ".join(turn["content"] for turn in tags["dialogue"]))[0]
        request = f"The user asked how to {TOPICS[topic][0][0]}."
        return {"facets": [{"name": one["name"], "value": request} for one in tags["facets"]]}


class MortalProvider(BrainProvider):
    """Writes down every answer, and kills its process in the place of one of them."""

    def __init__(self, log_path: Path, *, last: int | None) -> None:
        super().__init__(TerseBrain())
        self._log_path = log_path
        self._last = last
        self._n_given = len(answers_in(log_path))

    def chat_completion(self, messages: Any, temperature: Any = None, max_tokens: Any = None) -> str:
        if self._n_given == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = super().chat_completion(messages, temperature, max_tokens)
        with self._log_path.open("a") as log:
            log.write(hashlib.sha256(self.prompts[-1].encode()).hexdigest() + "\n")
        self._n_given += 1
        return answer


def answers_in(log_path: Path) -> list[str]:
    """The questions that were answered so far, as hashes."""
    return log_path.read_text().split() if log_path.exists() else []


def run(settings: ClioSettings, *, overwrite: bool = False) -> dict[str, Any]:
    """One run, to its end or its death."""
    folder = Path(settings.input_path).parent
    point = json.loads((folder / "die_at.json").read_text())

    def die_at_file(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and Path(os.fsdecode(arguments[1])).name == point.get("file"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die_at_file)
    provider = MortalProvider(folder / "answers.log", last=point.get("answers"))
    return run_clio(settings, LLM, overwrite=overwrite, progress=False, provider=provider)


def check(settings: ClioSettings) -> dict[str, Any]:
    """What the command line asks of a script."""
    return {}

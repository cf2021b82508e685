"""The models of one run: the one that answers, others that judge or are compared, one budget and one count for all."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

from llm_parts.client import BaseLLMProvider, LlmClient
from llm_parts.clio.parent_names import Questions
from llm_parts.clio.run_folder import RunFolder
from llm_parts.clio.settings import ClioSettings, ModelChoice
from llm_parts.settings import LlmSettings


class Models:
    """Clients of all models of a run, on one cache and one prompt log.

    `provider` is an object of one's own in the place of the one that section `llm` names. The limits of section `llm`
    hold for all models together: a further model gets what the ones before it have left.
    """

    def __init__(
        self, settings: ClioSettings, llm: LlmSettings, *, folder: RunFolder, provider: BaseLLMProvider | None = None
    ) -> None:
        self.settings = settings
        self.llm = llm
        self._folder = folder
        self._provider = provider
        self._stack = ExitStack()
        self._clients: dict[str, LlmClient] = {}
        self.main = self._open(ModelChoice().label(llm), llm)

    def preflight(self) -> None:
        """Ask every model that the run will need whether it is there, before the first of them is paid for more."""
        self.main.preflight()
        settings = self.settings
        for choice in [*settings.judges, *settings.extractors] if settings.judge_sample else []:
            chosen = choice.llm_settings(self.llm)
            name = f"{choice.label(self.llm)}, preflight"
            if chosen != self.llm and name not in self._clients:
                # A client of its own: that of the judging gets the budget that is left by then.
                self._open(name, self._with_what_is_left(chosen)).preflight()

    def questions(self) -> Questions:
        """The main model, asked with the temperature and top_p of the section `clio`."""
        return Questions(self.main, self.settings)

    def judge_questions(self, choice: ModelChoice) -> Questions:
        """A model that judges, asked with its own temperature."""
        settings = self.settings.model_copy(update={"temperature": None, "top_p": None})
        return Questions(self.client(choice), settings)

    def client(self, choice: ModelChoice) -> LlmClient:
        """The client of a model; the main one where the choice is that of section `llm`."""
        chosen = choice.llm_settings(self.llm)
        if chosen == self.llm:
            return self.main
        name = choice.label(self.llm)
        if name not in self._clients:
            self._open(name, self._with_what_is_left(chosen))
            self._clients[name].preflight()
        return self._clients[name]

    def ledger(self) -> dict[str, Any]:
        """Counts by step over all models, as a client's ledger gives them; cost is None where a price is not known."""
        steps: dict[str, dict[str, Any]] = {}
        for client in self._clients.values():
            for step, counts in client.ledger.summary()["steps"].items():
                steps[step] = _sum(steps[step], counts) if step in steps else dict(counts)
        return steps

    def __enter__(self) -> Models:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _open(self, name: str, llm: LlmSettings) -> LlmClient:
        provider = self._provider if llm.provider == self.llm.provider else None
        prompts_path = self._folder.prompts_path if self.settings.log_prompts else None
        client = LlmClient(
            llm, provider=provider, prompts_path=prompts_path, default_cache_path=self._folder.cache_path
        )
        self._clients[name] = self._stack.enter_context(client)
        return client

    def _with_what_is_left(self, llm: LlmSettings) -> LlmSettings:
        totals = [client.ledger.summary() for client in self._clients.values()]
        spent = {
            "max_calls": sum(total["calls"] for total in totals),
            "max_tokens": sum(total["tokens_in"] + total["tokens_out"] for total in totals),
            "max_cost": sum(total["cost"] or 0.0 for total in totals),
        }
        left = {
            name: max(0, getattr(llm, name) - used) for name, used in spent.items() if getattr(llm, name) is not None
        }
        return llm.model_copy(update=left)


def local_model(llm: LlmSettings) -> str | None:
    """The causal model of a provider in this process, which can embed and decode too; None for any other provider."""
    return llm.model_name if llm.provider == "transformers" else None


def _sum(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Counts added up; nested counts too, and None (not known) stays None."""
    total: dict[str, Any] = {}
    for name in {**one, **other}:
        a, b = one.get(name), other.get(name)
        if isinstance(a, dict) or isinstance(b, dict):
            total[name] = _sum(a or {}, b or {})
        elif name in one and name in other:
            total[name] = None if a is None or b is None else a + b
        else:
            total[name] = a if name in one else b
    return total

"""Wire formats: what each provider is sent and what comes back, and nothing of when, how often or at what cost.

`PROVIDERS` maps the values of `llm.provider` to factories; add one's own:

    PROVIDERS["mine"] = lambda settings: MyProvider(settings.model)
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from common.config import UserError
from llm_parts.settings import LlmSettings, Settings
from llm_parts.wires.base import BaseLLMProvider


def _ollama(settings: LlmSettings) -> BaseLLMProvider:
    from llm_parts.wires.ollama_wire import OllamaWire

    return OllamaWire(settings)


def _openai(settings: LlmSettings) -> BaseLLMProvider:
    from llm_parts.wires.openai_wire import OpenAiWire

    return OpenAiWire(settings)


def _openrouter(settings: LlmSettings) -> BaseLLMProvider:
    from llm_parts.wires.openai_wire import OpenRouterWire

    return OpenRouterWire(settings)


def _anthropic(settings: LlmSettings) -> BaseLLMProvider:
    from llm_parts.wires.anthropic_wire import AnthropicWire

    return AnthropicWire(settings)


def _triton(settings: LlmSettings) -> BaseLLMProvider:
    from llm_parts.wires.openai_wire import TritonOpenAiWire
    from llm_parts.wires.triton_wire import TritonInferWire, TritonWire

    if settings.triton_api == "openai":
        return TritonOpenAiWire(settings)
    return TritonInferWire(settings) if settings.triton_api == "infer" else TritonWire(settings)


def _transformers(settings: LlmSettings) -> BaseLLMProvider:
    from llm_parts.wires.transformers_wire import TransformersWire

    return TransformersWire(settings)


def _extractive(settings: LlmSettings) -> BaseLLMProvider:
    from llm_parts.wires.extractive_wire import ExtractiveWire

    return ExtractiveWire(settings)


PROVIDERS: dict[str, Callable[[LlmSettings], BaseLLMProvider]] = {
    "ollama": _ollama,
    "openai": _openai,
    "openrouter": _openrouter,
    "anthropic": _anthropic,
    "triton": _triton,
    "transformers": _transformers,
    "extractive": _extractive,
}


def get_llm_provider(name: str | None = None, settings: LlmSettings | Settings | None = None) -> BaseLLMProvider:
    """The provider of that name, by default the one that the settings name; no settings means `Settings()`.

    Raises UserError where there is no such provider or its key is not set.
    """
    if settings is None:
        settings = Settings()
    if isinstance(settings, Settings):
        settings = settings.llm_settings(name)
    name = name or settings.provider
    require_provider(name)
    if settings.provider != name:
        settings = settings.model_copy(update={"provider": name})
    return PROVIDERS[name](settings)


def require_provider(name: str) -> None:
    """Raise UserError where there is no provider of that name."""
    if name not in PROVIDERS:
        close = difflib.get_close_matches(name, PROVIDERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f" (there are: {', '.join(PROVIDERS)})"
        raise UserError(f"llm.provider: there is no provider {name!r}{hint}")

"""Somebody's own provider, of which nothing is known but `chat_completion`."""

from __future__ import annotations

from typing import ClassVar

from common.config import UserError
from llm_parts.settings import LlmSettings
from llm_parts.wires.base import BaseLLMProvider, Capabilities, Reply, Wire, WireCall
from llm_parts.wires.errors import WireError


class CustomWire(Wire):
    """Calls a user's provider by its prompt alone; its network errors are retried, all others are its own."""

    needs_preflight: ClassVar[bool] = False

    def __init__(self, settings: LlmSettings, provider: BaseLLMProvider) -> None:
        super().__init__(settings)
        self.provider = provider
        kind = type(provider)
        # The class stands for the model in the cache where the provider does not name one.
        self.name = provider.name if provider.name != "custom" else f"{kind.__module__}.{kind.__qualname__}"
        self.model = provider.model

    def send(self, call: WireCall, capabilities: Capabilities) -> Reply:
        """Make one call; raises WireError where the network failed."""
        try:
            text = self.provider.chat_completion(
                call.messages, temperature=call.temperature, max_tokens=call.max_tokens
            )
        except TimeoutError as error:
            raise WireError("timeout", str(error) or "timed out") from error
        except ConnectionError as error:
            raise WireError("dropped", str(error) or type(error).__name__) from error
        if not isinstance(text, str):
            kind = type(self.provider).__name__
            raise UserError(f"{kind}.chat_completion returned {type(text).__name__}; it must return the text (str)")
        return Reply(text)

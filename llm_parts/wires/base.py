"""What a provider is to the rest of the program: one call in, one reply or one classified error out.

A wire translates; it does not retry, wait, count or remember. That is one policy for all of them, in client.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# How an answer is held to its JSON schema: a field of the request, a tool that must be called, or the prompt alone.
Mode = Literal["schema", "tool", "prompt"]


class BaseLLMProvider(ABC):
    """A model that answers a chat; a subclass with only `chat_completion` works everywhere, cached and retried."""

    name: str = "custom"
    model: str = "custom"

    @abstractmethod
    def chat_completion(
        self, messages: list[Message], temperature: float | None = None, max_tokens: int | None = None
    ) -> str:
        """The text that answers `messages`; None leaves temperature and length to the provider's own settings."""


@dataclass(frozen=True)
class Capabilities:
    """What a model accepts, as far as its preflight call told."""

    mode: Mode = "prompt"
    temperature: bool = True
    token_limit: Literal["max_completion_tokens", "max_tokens"] | None = "max_tokens"
    think: bool = True  # whether the request may say `think`


@dataclass(frozen=True)
class WireCall:
    """One call: messages, the JSON schema of the answer and the parameters of generation."""

    messages: list[Message]
    schema: dict[str, Any]
    schema_name: str
    temperature: float | None
    max_tokens: int


@dataclass(frozen=True)
class Reply:
    """What came back: the text, why it ended and what it cost in tokens (None where the server does not say)."""

    text: str
    finish: Literal["stop", "length", "refusal"] = "stop"
    tokens_in: int | None = None
    tokens_out: int | None = None

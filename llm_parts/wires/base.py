"""What a provider is to the rest of the program: one call in, one reply or one classified error out.

A wire translates; it does not retry, wait, count or remember. That is one policy for all of them, in client.py.
"""

from __future__ import annotations

import ipaddress
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit, urlunsplit

from common.config import UserError
from llm_parts.schemas import Message
from llm_parts.settings import KEY_NAMES, PROVIDERS_THAT_NEED_A_KEY, LlmSettings
from llm_parts.wires.errors import WireError

# How an answer is held to its JSON schema: a field of the request, a tool that must be called, or the prompt alone.
Mode = Literal["schema", "tool", "prompt"]

# Words in a 400 by which a server names the thing it does not take, and so the rung of the ladder to leave.
_WORDS_OF_A_SCHEMA = (
    "response_format",
    "json_schema",
    "output_config",
    "output_format",
    "structured",
    "schema",
    "format",
)
_WORDS_OF_A_TOOL = ("tool", "function")


_CONNECT_TIMEOUT_S = 15.0


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
    token_limit: Literal["max_completion_tokens", "max_tokens"] = "max_tokens"
    think: bool = True  # whether the request may say `think`

    def to_json(self) -> str:
        """The record as it is kept in the cache."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class WireCall:
    """One call: messages, the JSON schema of the answer (None: free text) and the parameters of generation."""

    messages: list[Message]
    schema: dict[str, Any] | None = None
    schema_name: str = ""
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int = 4096


@dataclass(frozen=True)
class Reply:
    """What came back: the text, why it ended and what it took in tokens (None where the server does not say)."""

    text: str
    finish: Literal["stop", "length", "refusal"] = "stop"
    tokens_in: int | None = None
    tokens_out: int | None = None


class Wire(BaseLLMProvider):
    """A provider of ours: `send` makes one call in the way that `capabilities` permits."""

    modes: ClassVar[tuple[Mode, ...]] = ("prompt",)  # best first
    needs_preflight: ClassVar[bool] = True
    schema_in_prompt: ClassVar[bool] = False  # the model does not see the schema that the server holds it to

    def __init__(self, settings: LlmSettings) -> None:
        self.settings = settings
        self.name = settings.provider
        self.model = settings.model_name
        self.capabilities = Capabilities(mode=self.modes[0])

    @abstractmethod
    def send(self, call: WireCall, capabilities: Capabilities) -> Reply:
        """Make one call; raises WireError where no reply came of it."""

    @property
    def connect_timeout_s(self) -> float:
        """Seconds to wait for a connection: a model may think for minutes, a socket opens at once."""
        return min(_CONNECT_TIMEOUT_S, self.settings.timeout_s)

    def close(self) -> None:
        """Close connections."""

    @property
    def secrets(self) -> tuple[str, ...]:
        """Texts that must appear in no log, error or file."""
        key = self.settings.api_key()
        return (key.get_secret_value(),) if key else ()

    def chat_completion(
        self, messages: list[Message], temperature: float | None = None, max_tokens: int | None = None
    ) -> str:
        """The text that answers `messages`: one call, no retry; raises WireError, or UserError without a key."""
        call = WireCall(
            messages=messages,
            temperature=self.settings.temperature if temperature is None else temperature,
            top_p=self.settings.top_p,
            max_tokens=self.settings.max_answer_tokens if max_tokens is None else max_tokens,
        )
        tried: set[Capabilities] = set()
        while True:
            tried.add(self.capabilities)
            try:
                return self.send(call, self.capabilities).text
            except WireError as error:
                self.capabilities = self.adapted(self.capabilities, error, tried)

    def adapted(self, capabilities: Capabilities, error: WireError, tried: set[Capabilities]) -> Capabilities:
        """What to try next where a server does not take something we sent; raises `error` where nothing is left."""
        if error.kind == "rejected":
            for candidate in self._alternatives(capabilities, error.message.lower()):
                if candidate not in tried:
                    return candidate
        raise error

    def next_mode(self, capabilities: Capabilities) -> Capabilities | None:
        """The next way to hold an answer to its schema; None after the last."""
        rest = self.modes[self.modes.index(capabilities.mode) + 1 :]
        return replace(capabilities, mode=rest[0]) if rest else None

    def _alternatives(self, now: Capabilities, said: str) -> list[Capabilities]:
        options = []
        if "max_tokens" in said or "max_completion_tokens" in said:
            other: Any = "max_tokens" if now.token_limit == "max_completion_tokens" else "max_completion_tokens"
            options.append(replace(now, token_limit=other))
        if "temperature" in said or "top_p" in said:
            options.append(replace(now, temperature=False))
        if "think" in said:
            options.append(replace(now, think=False))
        words = {"schema": _WORDS_OF_A_SCHEMA, "tool": _WORDS_OF_A_TOOL, "prompt": ()}[now.mode]
        lower = self.next_mode(now)
        if lower and any(word in said for word in words):
            options.append(lower)
        return options


def require_key(settings: LlmSettings) -> str | None:
    """The key of the provider; raises UserError where it needs one and none is set."""
    key = settings.api_key()
    if key is None and settings.provider in PROVIDERS_THAT_NEED_A_KEY:
        name = KEY_NAMES[settings.provider]
        raise UserError(
            f"llm.provider is {settings.provider}, but {name} is not set; put it in the environment or in a file .env "
            "(env.example shows how)"
        )
    return key.get_secret_value() if key else None


def with_path(url: str, *, wanted: str, cut: tuple[str, ...] = ()) -> str:
    """A base URL with the path `wanted` where it has none, and without what `cut` names at its end.

    Raises UserError where the URL is none.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"llm.url {shown_url(url)!r} is no address of a server; write http://HOST:PORT")
    path = parts.path.rstrip("/")
    for ending in cut:
        path = path.removesuffix(ending)
    return urlunsplit((parts.scheme, parts.netloc, path or wanted, "", ""))


def shown_url(url: str) -> str:
    """A URL without the user, password and query that it may carry."""
    parts = urlsplit(url)
    netloc = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, netloc, parts.path, "", ""))


def is_loopback(url: str) -> bool:
    """Whether a URL points to this machine, which no proxy can reach for us."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

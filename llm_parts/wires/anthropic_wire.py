"""The Messages API of Anthropic."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any, ClassVar

from llm_parts.settings import LlmSettings
from llm_parts.wires.base import Capabilities, Mode, Reply, Wire, WireCall, is_loopback, require_key, with_path
from llm_parts.wires.errors import WireError, connection_error, status_error, timeout_error


class AnthropicWire(Wire):
    """`POST {url}/v1/messages` by the official client, its own retries switched off."""

    modes: ClassVar[tuple[Mode, ...]] = ("schema", "tool", "prompt")

    def __init__(self, settings: LlmSettings) -> None:
        super().__init__(settings)
        self._key = require_key(settings)
        self.url = with_path(settings.base_url or "", wanted="", cut=("/messages", "/v1"))

    @cached_property
    def _client(self) -> Any:
        import anthropic

        return anthropic.Anthropic(
            api_key=self._key,
            base_url=self.url,
            max_retries=0,
            timeout=anthropic.Timeout(self.settings.timeout_s, connect=self.connect_timeout_s),
            http_client=anthropic.DefaultHttpxClient(trust_env=not is_loopback(self.url)),
        )

    def close(self) -> None:
        """Close connections."""
        if "_client" in self.__dict__:
            self._client.close()

    def send(self, call: WireCall, capabilities: Capabilities) -> Reply:
        """Make one call; raises WireError where no reply came of it."""
        import anthropic

        try:
            message = self._client.messages.create(**self._arguments(call, capabilities))
        except anthropic.APIStatusError as error:
            raise status_error(error.status_code, error.body or error.message, error.response.headers) from None
        except anthropic.APITimeoutError as error:
            raise timeout_error(error, timeout_s=self.settings.timeout_s) from None
        except anthropic.APIConnectionError as error:
            raise connection_error(error) from None
        except (anthropic.AnthropicError, ValueError) as error:
            raise WireError("bad_reply", f"the reply is not what the API promises: {error}") from None
        return _read(message)

    def _arguments(self, call: WireCall, capabilities: Capabilities) -> dict[str, Any]:
        system = "\n\n".join(message["content"] for message in call.messages if message["role"] == "system")
        turns = [message for message in call.messages if message["role"] != "system"]
        arguments: dict[str, Any] = {"model": self.model, "max_tokens": call.max_tokens, "messages": turns}
        if system:
            arguments["system"] = system
        # The client has no such arguments any more; the API takes them for the models that still have them.
        sampling = {"temperature": call.temperature, "top_p": call.top_p} if capabilities.temperature else {}
        given = {name: value for name, value in sampling.items() if value is not None}
        if given:
            arguments["extra_body"] = given
        if call.schema is not None and capabilities.mode == "schema":
            arguments["output_config"] = {"format": {"type": "json_schema", "schema": call.schema}}
        elif call.schema is not None and capabilities.mode == "tool":
            tool = {"name": call.schema_name, "description": "Give the answer.", "input_schema": call.schema}
            arguments["tools"] = [tool]
            arguments["tool_choice"] = {"type": "tool", "name": call.schema_name}
        return arguments


def _read(message: Any) -> Reply:
    content = getattr(message, "content", None)
    if not isinstance(content, list):
        raise WireError("bad_reply", f"the reply has no content: {str(message)[:200]}")
    used = [json.dumps(block.input, ensure_ascii=False) for block in content if block.type == "tool_use"]
    texts = [block.text for block in content if block.type == "text"]
    reason = message.stop_reason
    finish: Any = {"refusal": "refusal", "max_tokens": "length", "model_context_window_exceeded": "length"}.get(reason)
    usage = message.usage
    return Reply(
        used[0] if used else "".join(texts),
        finish=finish or "stop",
        tokens_in=_tokens_in(usage),
        tokens_out=getattr(usage, "output_tokens", None),
    )


def _tokens_in(usage: Any) -> int | None:
    """All prompt tokens: those read from and written to the provider's prompt cache are counted apart by the API."""
    parts = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    counts = [getattr(usage, part, None) for part in parts]
    return None if counts[0] is None else sum(count or 0 for count in counts)

"""The chat completions of OpenAI and of all who speak them: OpenRouter and the OpenAI frontend of Triton."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from llm_parts.settings import LlmSettings
from llm_parts.wires.base import Capabilities, Mode, Reply, Wire, WireCall, is_loopback, require_key, with_path
from llm_parts.wires.errors import WireError, connection_error, error_in_reply, status_error, timeout_error


class OpenAiWire(Wire):
    """`POST {url}/chat/completions` by the official client, its own retries switched off."""

    modes: ClassVar[tuple[Mode, ...]] = ("schema", "tool", "prompt")
    path = "/v1"
    extra_body: ClassVar[dict[str, Any]] = {}

    def __init__(self, settings: LlmSettings) -> None:
        super().__init__(settings)
        self._key = require_key(settings)
        self.url = with_path(settings.base_url or "", wanted=self.path, cut=("/chat/completions",))
        self.capabilities = Capabilities(mode=self.modes[0], token_limit="max_completion_tokens")

    @cached_property
    def _client(self) -> Any:
        import openai

        return openai.OpenAI(
            api_key=self._key or "none",  # the client wants one, a server of one's own does not
            base_url=self.url,
            max_retries=0,
            timeout=openai.Timeout(self.settings.timeout_s, connect=self.connect_timeout_s),
            http_client=openai.DefaultHttpxClient(trust_env=not is_loopback(self.url)),
        )

    def close(self) -> None:
        """Close connections."""
        if "_client" in self.__dict__:
            self._client.close()

    def send(self, call: WireCall, capabilities: Capabilities) -> Reply:
        """Make one call; raises WireError where no reply came of it."""
        import openai

        try:
            completion = self._client.chat.completions.create(**self._arguments(call, capabilities))
        except openai.APIStatusError as error:
            raise status_error(error.status_code, error.body or error.message, error.response.headers) from None
        except openai.APITimeoutError as error:
            raise timeout_error(error, timeout_s=self.settings.timeout_s) from None
        except openai.APIConnectionError as error:
            raise connection_error(error) from None
        except (openai.OpenAIError, ValueError) as error:
            raise WireError("bad_reply", f"the reply is not what the API promises: {error}") from None
        return _read(completion)

    def _arguments(self, call: WireCall, capabilities: Capabilities) -> dict[str, Any]:
        arguments: dict[str, Any] = {"model": self.model, "messages": call.messages}
        arguments[capabilities.token_limit] = call.max_tokens
        if capabilities.temperature and call.temperature is not None:
            arguments["temperature"] = call.temperature
        if capabilities.temperature and call.top_p is not None:
            arguments["top_p"] = call.top_p
        if call.schema is not None and capabilities.mode == "schema":
            form = {"name": call.schema_name, "strict": True, "schema": call.schema}
            arguments["response_format"] = {"type": "json_schema", "json_schema": form}
        elif call.schema is not None and capabilities.mode == "tool":
            function = {"name": call.schema_name, "description": "Give the answer.", "parameters": call.schema}
            arguments["tools"] = [{"type": "function", "function": function}]
            arguments["tool_choice"] = {"type": "function", "function": {"name": call.schema_name}}
        if self.extra_body:
            arguments["extra_body"] = self.extra_body
        return arguments


class OpenRouterWire(OpenAiWire):
    """OpenRouter: the same format; a route that would drop one of our parameters is not taken."""

    path = "/api/v1"
    extra_body: ClassVar[dict[str, Any]] = {"provider": {"require_parameters": True}}

    def __init__(self, settings: LlmSettings) -> None:
        super().__init__(settings)
        self.capabilities = Capabilities(mode="schema", token_limit="max_tokens")


class TritonOpenAiWire(OpenAiWire):
    """The OpenAI frontend of Triton, which takes a response_format and ignores it: only a forced tool binds it."""

    modes: ClassVar[tuple[Mode, ...]] = ("tool", "prompt")

    def __init__(self, settings: LlmSettings) -> None:
        super().__init__(settings)
        self.capabilities = Capabilities(mode="tool", token_limit="max_tokens")


def _read(completion: Any) -> Reply:
    error = getattr(completion, "error", None)
    if error:
        raise error_in_reply(error)
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list):
        raise WireError("bad_reply", f"the reply has no choices: {str(completion)[:200]}")
    usage = getattr(completion, "usage", None)
    tokens: dict[str, Any] = {
        "tokens_in": getattr(usage, "prompt_tokens", None),
        "tokens_out": getattr(usage, "completion_tokens", None),
    }
    if not choices:
        return Reply("", **tokens)
    message = choices[0].message
    reason = choices[0].finish_reason
    if getattr(message, "refusal", None) or reason == "content_filter":
        return Reply(message.refusal or message.content or "", finish="refusal", **tokens)
    called = getattr(message, "tool_calls", None) or ()
    texts = [call.function.arguments for call in called if getattr(call, "function", None)]
    text = texts[0] if texts else message.content or ""
    return Reply(text, finish="length" if reason == "length" else "stop", **tokens)

"""The native chat API of Ollama, whose `format` takes a JSON schema and whose context length must be said."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any, ClassVar

from llm_parts.settings import LlmSettings
from llm_parts.wires.base import Capabilities, Mode, Reply, Wire, WireCall, is_loopback, with_path
from llm_parts.wires.errors import WireError, connection_error, status_error, timeout_error

log = logging.getLogger(__name__)

_BYTES_PER_TOKEN = 3.0  # on the safe side: Ollama cuts a prompt that does not fit, and does not say so


class OllamaWire(Wire):
    """`POST {url}/api/chat` by the official client, which has no retries of its own."""

    modes: ClassVar[tuple[Mode, ...]] = ("schema", "prompt")  # Ollama cannot force a tool
    schema_in_prompt: ClassVar[bool] = True  # `format` binds the sampler, the model is not told

    def __init__(self, settings: LlmSettings) -> None:
        super().__init__(settings)
        self.url = with_path(settings.base_url or "", wanted="", cut=("/chat", "/api", "/v1"))
        self._num_ctx = settings.num_ctx

    @cached_property
    def _client(self) -> Any:
        import httpx
        import ollama

        key = self.settings.api_key()
        return ollama.Client(
            host=self.url,
            timeout=httpx.Timeout(self.settings.timeout_s, connect=self.connect_timeout_s),
            headers={"Authorization": f"Bearer {key.get_secret_value()}"} if key else None,
            trust_env=not is_loopback(self.url),
            # The client's own error drops the headers, and Retry-After with them; so the status is read before it is.
            event_hooks={"response": [_raise_for_status]},
        )

    def close(self) -> None:
        """Close connections."""
        if "_client" in self.__dict__:
            self._client.close()

    def send(self, call: WireCall, capabilities: Capabilities) -> Reply:
        """Make one call; raises WireError where no reply came of it."""
        import httpx
        import ollama

        try:
            response = self._client.chat(**self._arguments(call, capabilities))
        except httpx.TimeoutException as error:
            raise timeout_error(error, timeout_s=self.settings.timeout_s) from None
        except ConnectionError as error:  # what the client makes of a refused connection
            raise WireError("unreachable", str(error)) from None
        except httpx.TransportError as error:
            raise connection_error(error) from None
        except (ollama.ResponseError, httpx.HTTPError, ValueError, TypeError) as error:
            raise WireError("bad_reply", f"the reply is not what the API promises: {error}") from None
        return Reply(
            response.message.content or "",
            finish="length" if response.done_reason == "length" else "stop",
            tokens_in=response.prompt_eval_count,
            tokens_out=response.eval_count,
        )

    def _arguments(self, call: WireCall, capabilities: Capabilities) -> dict[str, Any]:
        options: dict[str, Any] = {"num_predict": call.max_tokens, "num_ctx": self._context_length(call)}
        sampling = {"temperature": call.temperature, "top_p": call.top_p, "seed": self.settings.seed}
        if not capabilities.temperature:
            sampling = {"seed": self.settings.seed}
        options |= {name: value for name, value in sampling.items() if value is not None}
        arguments: dict[str, Any] = {
            "model": self.model,
            "messages": call.messages,
            "stream": False,
            "options": options,
            "keep_alive": self.settings.keep_alive,
        }
        if capabilities.think:
            arguments["think"] = self.settings.think
        if call.schema is not None and capabilities.mode == "schema":
            arguments["format"] = call.schema
        return arguments

    def _context_length(self, call: WireCall) -> int:
        """`num_ctx`, doubled until prompt and answer fit; it never shrinks again, since a change reloads the model."""
        n_bytes = sum(len(message["content"].encode()) for message in call.messages)
        needed = n_bytes / _BYTES_PER_TOKEN + call.max_tokens
        while self._num_ctx < needed:
            self._num_ctx *= 2
            log.warning("ollama: llm.num_ctx raised to %d for a prompt of %d bytes", self._num_ctx, n_bytes)
        return self._num_ctx

    def _alternatives(self, now: Capabilities, said: str) -> list[Capabilities]:
        # Ollama has one name for the length limit; the rest is as everywhere.
        return [other for other in super()._alternatives(now, said) if other.token_limit == now.token_limit]


def _raise_for_status(response: Any) -> None:
    if response.status_code >= 400:
        response.read()
        try:
            body = response.json()
        except ValueError:
            body = response.text
        raise status_error(response.status_code, body, response.headers)

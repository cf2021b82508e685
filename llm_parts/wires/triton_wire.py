"""Triton's own endpoints: generate (one text in, one out) and KServe infer (named tensors in, named tensors out)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from llm_parts.settings import LlmSettings
from llm_parts.wires.base import Capabilities, Message, Reply, Wire, WireCall, is_loopback, with_path
from llm_parts.wires.errors import WireError, connection_error, status_error, timeout_error


class TritonWire(Wire):
    """What generate and infer share: plain JSON over HTTP, a prompt rendered by us, no way to bind a schema."""

    endpoint = "generate"

    def __init__(self, settings: LlmSettings) -> None:
        super().__init__(settings)
        base = with_path(settings.base_url or "", wanted="").split("/v2/")[0].removesuffix("/v2")
        self.url = base
        self._address = f"{base}/v2/models/{self.model}/{self.endpoint}"

    @cached_property
    def _client(self) -> Any:
        import httpx

        key = self.settings.api_key()
        return httpx.Client(
            timeout=httpx.Timeout(self.settings.timeout_s, connect=self.connect_timeout_s),
            headers={"Authorization": f"Bearer {key.get_secret_value()}"} if key else None,
            trust_env=not is_loopback(self.url),
        )

    def close(self) -> None:
        """Close connections."""
        if "_client" in self.__dict__:
            self._client.close()

    def send(self, call: WireCall, capabilities: Capabilities) -> Reply:
        """Make one call; raises WireError where no reply came of it."""
        prompt = render_prompt(call.messages, template=self.settings.chat_template)
        text = self._read(self._post(self._body(prompt, call, capabilities)))
        # Some backends give the prompt back before the answer, whatever they are told.
        return Reply(text[len(prompt) :] if text.startswith(prompt) else text)

    def _post(self, body: dict[str, Any]) -> Any:
        import httpx

        try:
            response = self._client.post(self._address, json=body)
        except httpx.TimeoutException as error:
            raise timeout_error(error, timeout_s=self.settings.timeout_s) from None
        except httpx.HTTPError as error:
            raise connection_error(error) from None
        try:
            content = response.json()
        except ValueError:
            content = None
        if response.status_code >= 400:
            raise status_error(response.status_code, content or response.text, response.headers)
        return content

    def _body(self, prompt: str, call: WireCall, capabilities: Capabilities) -> dict[str, Any]:
        parameters: dict[str, Any] = {"stream": False, "max_tokens": call.max_tokens}
        if capabilities.temperature and call.temperature is not None:
            parameters["temperature"] = call.temperature
        if capabilities.temperature and call.top_p is not None:
            parameters["top_p"] = call.top_p
        return {"text_input": prompt, "parameters": parameters, "exclude_input_in_output": True}

    def _read(self, content: Any) -> str:
        text = content.get("text_output") if isinstance(content, dict) else None
        if isinstance(text, list) and len(text) == 1:
            text = text[0]
        if not isinstance(text, str):
            raise WireError("bad_reply", f"the reply has no text_output: {str(content)[:200]}")
        return text


class TritonInferWire(TritonWire):
    """KServe infer: `llm.triton_tensors` names the tensors of the model."""

    endpoint = "infer"

    def _body(self, prompt: str, call: WireCall, capabilities: Capabilities) -> dict[str, Any]:
        tensors = self.settings.triton_tensors
        inputs = [self._tensor(tensors.text, "BYTES", prompt)]
        if tensors.max_tokens:
            inputs.append(self._tensor(tensors.max_tokens, "INT32", call.max_tokens))
        if tensors.temperature and capabilities.temperature and call.temperature is not None:
            inputs.append(self._tensor(tensors.temperature, "FP32", call.temperature))
        return {"inputs": inputs, "outputs": [{"name": tensors.response}]}

    def _tensor(self, name: str, datatype: str, value: Any) -> dict[str, Any]:
        shape = list(self.settings.triton_tensors.shape)
        return {"name": name, "shape": shape, "datatype": datatype, "data": [value]}

    def _read(self, content: Any) -> str:
        wanted = self.settings.triton_tensors.response
        outputs = content.get("outputs") if isinstance(content, dict) else None
        for output in outputs if isinstance(outputs, list) else ():
            if output.get("name") == wanted and output.get("data"):
                return str(output["data"][0])
        found = [output.get("name") for output in outputs] if isinstance(outputs, list) else str(content)[:200]
        raise WireError("bad_reply", f"the reply has no tensor {wanted!r} (has: {found}); see llm.triton_tensors")


def render_prompt(messages: list[Message], *, template: str) -> str:
    """Messages as the one text that a bare model reads: `chatml` (Qwen and others) or `plain` headings."""
    if template == "chatml":
        turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
        return "".join(turns) + "<|im_start|>assistant\n"
    names = {"system": "System", "user": "User", "assistant": "Assistant"}
    turns = [f"{names[message['role']]}:\n{message['content']}\n\n" for message in messages]
    return "".join(turns) + "Assistant:\n"

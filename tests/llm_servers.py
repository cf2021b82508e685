"""HTTP servers on 127.0.0.1 that speak each provider's wire format, with a scripted brain and faults on demand.

    def brain(schema_name, messages, schema):      # -> the answer as a dict
        return {"reasoning": "", "decision": "same"}

    with LlmServer(brain) as server:
        settings = server.settings("openai", concurrency=4)      # LlmSettings that point here
        ...
        server.calls                       # one Call for each request that arrived
        server.faults = rates(malformed=0.1, rate_limited=0.05)  # or queue them: server.enqueue(fault("drop"))

One server speaks all formats, told apart by path. Calls of the preflight are answered without the brain and stand in
`server.calls` with `schema_name == "preflight"`; `server.n_calls(...)` leaves them out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from llm_parts.settings import LlmSettings

Brain = Callable[[str, list[dict[str, str]], Any], dict[str, Any]]

KEY = "sk-test-0123456789abcdef"  # what the servers take for a valid key where `require_key` is on

URLS = {
    "openai": "/v1",
    "openrouter": "/api/v1",
    "anthropic": "",
    "ollama": "",
    "triton": "",
}
_CHAT_PATHS = {
    "/v1/chat/completions": "openai",
    "/api/v1/chat/completions": "openrouter",
    "/v1/messages": "anthropic",
    "/api/chat": "ollama",
}
_TRITON_PATH = re.compile(r"^/v2/models/(?P<model>[^/]+)/(?P<endpoint>generate|infer)$")


@dataclass
class Call:
    """One request as it arrived."""

    format: str  # openai, openrouter, anthropic, ollama, generate or infer
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    schema_name: str
    messages: list[dict[str, str]]
    schema: Any
    mode: str  # schema, tool or prompt
    fault: str | None = None
    answered: bool = False  # a reply with status 200 was written in full

    @property
    def prompt(self) -> str:
        return "\n".join(message["content"] for message in self.messages)


@dataclass
class Fault:
    """Something that goes wrong: see `fault` for the kinds."""

    kind: str
    status: int = 500
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    text: str = ""


def fault(kind: str, **options: Any) -> Fault:
    """status (status=, body=, headers=), drop, half (drops within the body), slow (seconds=), html (200 with a page),
    malformed, prose, fenced, think, truncated, empty, huge, refusal, text (text=: this as the answer)."""
    return Fault(kind, **options)


def rate_limited(seconds: str = "0.01") -> Fault:
    return Fault("status", status=429, body={"error": {"message": "slow down"}}, headers={"Retry-After": seconds})


def rates(seed: int = 0, **shares: float) -> Callable[[Call, int], Fault | None]:
    """Faults by share, drawn from the prompt and how often it was seen, so that no order of arrival changes them.

    Shares: malformed, dropped, rate_limited, server_error, empty.
    """
    made = {
        "malformed": lambda: fault("malformed"),
        "dropped": lambda: fault("drop"),
        "rate_limited": rate_limited,
        "server_error": lambda: fault("status", status=503),
        "empty": lambda: fault("empty"),
    }

    def draw(call: Call, n_seen: int) -> Fault | None:
        digest = hashlib.sha256(f"{seed} {n_seen} {call.prompt}".encode()).digest()
        number = int.from_bytes(digest[:8], "big") / 2**64
        for kind, share in shares.items():
            if number < share:
                return made[kind]()
            number -= share
        return None

    return draw


class LlmServer:
    """All formats on one port of 127.0.0.1; `with` starts and stops it."""

    def __init__(
        self,
        brain: Brain | None = None,
        *,
        faults: Callable[[Call, int], Fault | None] | None = None,
        delay_s: float = 0.0,
        require_key: bool = False,
        ignore_schema: bool = False,
        port: int = 0,
    ) -> None:
        self.brain: Brain = brain or (lambda name, messages, schema: {})
        self.faults = faults
        self.delay_s = delay_s
        self.require_key = require_key
        self.ignore_schema = ignore_schema  # answers the preflight in prose, whatever the schema says
        self.refuses: dict[str, str] = {}  # a key of the body -> the message of the 400 that it brings
        self.models: set[str] | None = None  # where set: all others are 404
        self.calls: list[Call] = []
        self.n_in_flight = self.max_in_flight = 0
        self._queue: deque[Fault] = deque()
        self._seen: Counter[str] = Counter()
        self._busy_s = 0.0  # seconds times calls in flight
        self._changed_at = 0.0
        self._first_at = self._last_at = 0.0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.owner = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> LlmServer:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    def url(self, provider: str = "openai") -> str:
        return f"http://127.0.0.1:{self.port}{URLS[provider]}"

    def settings(self, provider: str = "openai", **keys: Any) -> LlmSettings:
        """LlmSettings that point to this server, with short waits."""
        from pydantic import SecretStr

        url = self.url("openai" if provider == "triton" and keys.get("triton_api") == "openai" else provider)
        values = {"provider": provider, "model": "test-model", "url": url, "retry_wait_s": 0.01, "timeout_s": 20}
        return LlmSettings(**{**values, **keys}).with_keys({provider: SecretStr(KEY)})

    def enqueue(self, *faults: Fault) -> None:
        """The next calls go wrong in this way, one each; the preflight is left alone."""
        self._queue.extend(faults)

    def forget(self) -> None:
        """Forget what arrived so far, and how busy it was."""
        self.calls.clear()
        self.max_in_flight, self._busy_s, self._first_at = 0, 0.0, 0.0

    def n_calls(self, schema_name: str | None = None) -> int:
        """Requests that arrived, the preflight's left out."""
        return sum(call.schema_name in (schema_name or call.schema_name,) for call in self.work())

    def work(self) -> list[Call]:
        return [call for call in self.calls if call.schema_name != "preflight"]

    @property
    def mean_in_flight(self) -> float:
        """Mean number of calls in flight between the first arrival and the last reply."""
        return self._busy_s / max(self._last_at - self._first_at, 1e-9)

    # --- Called by the handler ---------------------------------------------------------------------------------------

    def arrive(self, call: Call) -> Fault | None:
        with self._lock:
            self.calls.append(call)
            self._count(+1)
            if call.schema_name == "preflight":
                return None
            n_seen = self._seen[call.prompt]
            self._seen[call.prompt] += 1
            drawn = self._queue.popleft() if self._queue else self.faults(call, n_seen) if self.faults else None
            call.fault = drawn.kind if drawn else None
            return drawn

    def leave(self) -> None:
        with self._lock:
            self._count(-1)

    def _count(self, change: int) -> None:
        now = time.monotonic()
        if self._first_at == 0.0:
            self._first_at = self._changed_at = now
        self._busy_s += self.n_in_flight * (now - self._changed_at)
        self._changed_at = self._last_at = now
        self.n_in_flight += change
        self.max_in_flight = max(self.max_in_flight, self.n_in_flight)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    owner: LlmServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, or is killed, is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        owner = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        call = read_call(self.path, dict(self.headers), body)
        if call is None:
            return self._send(404, {"error": {"message": f"no such path: {self.path}"}})
        drawn = owner.arrive(call)
        try:
            self._answer(owner, call, drawn)
        finally:
            owner.leave()

    def _answer(self, owner: LlmServer, call: Call, drawn: Fault | None) -> None:
        refused = self._refusal(owner, call)
        if refused:
            return self._send(*refused)
        time.sleep(owner.delay_s + (drawn.seconds if drawn else 0.0))
        if drawn and drawn.kind == "status":
            body = drawn.body if drawn.body is not None else error_body(call.format, "the server is unwell")
            return self._send(drawn.status, body, drawn.headers)
        if drawn and drawn.kind == "drop":
            return self._hang_up()
        if drawn and drawn.kind == "html":
            return self._send(200, "<html><body>Welcome to the hotel</body></html>", {"Content-Type": "text/html"})
        if call.schema_name == "preflight":
            ignores = owner.ignore_schema or call.mode == "prompt"
            text = "Yes, water is wet." if ignores else json.dumps({"answer": "yes"})
        else:
            text = json.dumps(owner.brain(call.schema_name, call.messages, call.schema), ensure_ascii=False)
        text, finish = spoilt(text, drawn)
        reply = write_reply(call, text, finish)
        if drawn and drawn.kind == "half":
            return self._send(200, reply, cut=True)
        self._send(200, reply)
        call.answered = True

    def _refusal(self, owner: LlmServer, call: Call) -> tuple[int, Any] | None:
        if owner.require_key:
            given = call.headers.get("Authorization", "").removeprefix("Bearer ") or call.headers.get("X-Api-Key", "")
            if given != KEY:
                return 401, error_body(call.format, f"Incorrect API key provided: {given}")
        model = call.body.get("model")
        if owner.models is not None and model not in owner.models:
            return 404, error_body(call.format, f"model '{model}' not found")
        for name, message in owner.refuses.items():
            if name in call.body or name in call.body.get("options", {}):
                return 400, error_body(call.format, message)
        return None

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None, *, cut: bool = False) -> None:
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(content)}"]
        given = {"Content-Type": "application/json", **(headers or {})}
        lines += [f"{name}: {value}" for name, value in given.items()]
        # One write: two would wait for each other's acknowledgement.
        message = "\r\n".join(lines).encode() + b"\r\n\r\n" + content
        self.wfile.write(message[: -len(content) // 2] if cut else message)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


# --- Wire formats, from the side of the server --------------------------------------------------------------------


def read_call(path: str, headers: dict[str, str], body: dict[str, Any]) -> Call | None:
    """What a request asks for, whatever the format; None for an unknown path."""
    headers = {name.title(): value for name, value in headers.items()}
    form = _CHAT_PATHS.get(path)
    triton = _TRITON_PATH.match(path)
    if form is None and triton is None:
        return None
    if triton:
        form = triton["endpoint"]
        inputs = {tensor["name"]: tensor["data"][0] for tensor in body.get("inputs", ())}
        text = body["text_input"] if form == "generate" else next(iter(inputs.values()))
        messages = [{"role": "user", "content": text}]
        return Call(form, path, headers, body, _name_in(messages), messages, None, "prompt")
    messages = list(body["messages"])
    if form == "anthropic" and body.get("system"):
        messages.insert(0, {"role": "system", "content": body["system"]})
    name, schema, mode = _schema_of(form or "", body)
    return Call(form or "", path, headers, body, name or _name_in(messages), messages, schema, mode)


def _schema_of(form: str, body: dict[str, Any]) -> tuple[str | None, Any, str]:
    if body.get("tools"):
        tool = body["tools"][0]
        function = tool.get("function", tool)
        return function["name"], function.get("parameters") or function.get("input_schema"), "tool"
    if form == "anthropic" and "output_config" in body:
        return None, body["output_config"]["format"]["schema"], "schema"
    if form == "ollama" and "format" in body:
        return None, body["format"], "schema"
    if "response_format" in body:
        described = body["response_format"]["json_schema"]
        return described["name"], described["schema"], "schema"
    return None, None, "prompt"


def _name_in(messages: list[dict[str, str]]) -> str:
    found = re.search(r"schema: (\w+)", messages[0]["content"])
    return found[1] if found else ""


def spoilt(text: str, drawn: Fault | None) -> tuple[str, str]:
    """The text of an answer and why it ended, after a fault of the model rather than of the network."""
    kind = drawn.kind if drawn else None
    if kind in ("malformed", "truncated"):
        return text[: len(text) // 2], "length" if kind == "truncated" else "stop"
    made = {
        "prose": lambda: "I would rather talk about the weather.",
        "fenced": lambda: f"Here you are:\n```json\n{text}\n```\nAnything else?",
        "think": lambda: f'<think>Perhaps {{"decision": "none"}}? No.</think>\n\n{text}',
        "empty": lambda: "",
        "huge": lambda: "x" * 10_000_000,
        "text": lambda: drawn.text if drawn else "",
        "refusal": lambda: "I cannot help with that.",
    }
    return made[kind]() if kind in made else text, "refusal" if kind == "refusal" else "stop"


def write_reply(call: Call, text: str, finish: str) -> dict[str, Any]:
    """The body of a 200 in the format of the call."""
    n_in, n_out = len(call.prompt) // 4 + 1, len(text) // 4 + 1
    if call.format == "generate":
        return {"model_name": "m", "model_version": "1", "text_output": text}
    if call.format == "infer":
        wanted = call.body["outputs"][0]["name"]
        return {"outputs": [{"name": wanted, "shape": [1], "datatype": "BYTES", "data": [text]}]}
    if call.format == "ollama":
        message = {"role": "assistant", "content": text}
        counts = {"prompt_eval_count": n_in, "eval_count": n_out}
        reason = "length" if finish == "length" else "stop"
        return {"model": call.body["model"], "message": message, "done": True, "done_reason": reason, **counts}
    if call.format == "anthropic":
        return _anthropic_reply(call, text, finish, n_in, n_out)
    return _openai_reply(call, text, finish, n_in, n_out)


def _anthropic_reply(call: Call, text: str, finish: str, n_in: int, n_out: int) -> dict[str, Any]:
    content: dict[str, Any] = {"type": "text", "text": text}
    if call.mode == "tool":
        with contextlib.suppress(ValueError):
            content = {"type": "tool_use", "id": "t", "name": call.schema_name, "input": json.loads(text)}
    reason = {"stop": "end_turn", "length": "max_tokens", "refusal": "refusal"}[finish]
    usage = {"input_tokens": n_in, "output_tokens": n_out}
    head = {"id": "msg", "type": "message", "role": "assistant", "model": call.body["model"]}
    return {**head, "content": [content], "stop_reason": reason, "stop_sequence": None, "usage": usage}


def _openai_reply(call: Call, text: str, finish: str, n_in: int, n_out: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if finish == "refusal":
        message |= {"content": None, "refusal": text}
    elif call.mode == "tool":
        function = {"name": call.schema_name, "arguments": text}
        message |= {"content": None, "tool_calls": [{"id": "t", "type": "function", "function": function}]}
    usage = {"prompt_tokens": n_in, "completion_tokens": n_out, "total_tokens": n_in + n_out}
    choice = {"index": 0, "message": message, "finish_reason": "length" if finish == "length" else "stop"}
    head = {"id": "c", "object": "chat.completion", "created": 1, "model": call.body["model"]}
    return {**head, "choices": [choice], "usage": usage}


def error_body(form: str, message: str) -> dict[str, Any]:
    """An error as each provider words it."""
    if form in ("ollama", "generate", "infer"):
        return {"error": message}
    if form == "anthropic":
        return {"type": "error", "error": {"type": "invalid_request_error", "message": message}}
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}

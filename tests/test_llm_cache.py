"""What is kept: answers in the cache, prompts in the log, keys nowhere."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from llm_questions import SAME, client_of, question, same
from llm_servers import KEY, LlmServer, fault, rate_limited, rates

from common.config import UserError
from llm_parts.client import (
    LlmClient,
    LlmSettings,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def server():
    with LlmServer(same) as running:
        yield running


def test_what_was_answered_is_not_asked_again(server, tmp_path):
    keys = {"cache_path": str(tmp_path / "cache.sqlite")}
    with client_of(server, **keys) as client:
        client.answer(question())
    with client_of(server, concurrency=2, **keys) as client:
        again = client.answer(question())
        assert again.cached and again.value.decision == "same"
        assert client.ledger.summary()["calls"] == 0 and client.ledger.summary()["cached"] == 1
    assert server.n_calls() == 1


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"model": "other"}, {"max_answer_tokens": 50}])
def test_what_shapes_an_answer_is_part_of_its_key(server, tmp_path, change):
    for keys in ({}, change):
        with client_of(server, cache_path=str(tmp_path / "cache.sqlite"), **keys) as client:
            assert not client.answer(question()).cached
    assert server.n_calls() == 2


def test_an_unusable_answer_is_kept_too_and_asked_again_only_on_demand(server, tmp_path):
    keys = {"cache_path": str(tmp_path / "cache.sqlite")}
    server.enqueue(fault("prose"), fault("prose"))
    for _ in range(2):
        with client_of(server, **keys) as client:
            assert client.answer(question()).failure.kind == "invalid_json"
            assert client.ledger.summary()["failures"]["quarantined"] == 1
    assert server.n_calls() == 2
    with client_of(server, retry_quarantined=True, **keys) as client:
        assert client.answer(question()).ok
    assert server.n_calls() == 3


def test_the_same_question_at_the_same_time_is_asked_once(server):
    server.delay_s = 0.1
    with client_of(server, concurrency=10) as client:
        answers = client.ask_many([question()] * 20)
    assert all(answer.ok for answer in answers) and server.n_calls() == 1


def test_a_huge_answer_fills_neither_cache_nor_log(server, tmp_path):
    server.enqueue(fault("huge"), fault("huge"))
    cache, prompts = tmp_path / "cache.sqlite", tmp_path / "prompts.jsonl"
    with client_of(server, cache_path=str(cache), prompts_path=prompts, max_answer_chars=10_000) as client:
        answer = client.answer(question())
    assert answer.failure.kind == "too_long" and len(answer.text) == 2000
    assert cache.stat().st_size < 200_000 and prompts.stat().st_size < 50_000


@pytest.mark.parametrize("content", [b"not a database at all, only text that goes on for a while" * 20, None])
def test_a_file_that_is_no_cache_is_left_alone(tmp_path, content):
    path = tmp_path / "cache.sqlite"
    if content is None:
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE theirs (x)")
        connection.close()
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"cannot be used as a cache.*move the file away"):
        LlmClient(LlmSettings(provider="extractive", cache_path=str(path))).preflight()
    assert path.read_bytes() == before


# --- Killed and run again ---------------------------------------------------------------------------------------------

_RUN = """
import json, sys
from llm_parts.client import LlmClient, LlmRequest, LlmSettings
from llm_parts.schemas import MergeAnswer
url, cache, out = sys.argv[1:]
settings = LlmSettings(provider="triton", model="m", url=url, cache_path=cache, concurrency=4, retry_wait_s=0.01)
questions = [LlmRequest([{"role": "user", "content": f"pair {n}"}], MergeAnswer, "merge", "merge") for n in range(80)]
with LlmClient(settings) as client:
    answers = client.ask_many(questions)
    json.dump([a.value.decision if a.ok else a.failure.kind for a in answers], open(out, "w"))
"""


def test_killed_and_run_again_gives_the_same_and_repeats_no_answered_call(tmp_path):
    def run(server, name, kill_after=None):
        arguments = [
            sys.executable,
            "-c",
            _RUN,
            server.url("triton"),
            str(tmp_path / f"{name}.sqlite"),
            str(tmp_path / name),
        ]
        process = subprocess.Popen(arguments, cwd=ROOT)
        while kill_after is not None and process.poll() is None and len(server.calls) < kill_after:
            time.sleep(0.005)
        if kill_after is not None:
            process.send_signal(signal.SIGKILL)
        process.wait()

    faults = rates(malformed=0.2, dropped=0.05)
    with LlmServer(same, faults=faults, delay_s=0.01) as server:
        run(server, "whole")
    n_whole = len(server.calls)
    with LlmServer(same, delay_s=0.01) as server:
        # The fault of a prompt must not depend on how often a killed run had sent it: the first answer decides.
        server.faults = lambda call, n_seen: drawn if (drawn := faults(call, 0)) and drawn.kind == "malformed" else None
        for kill_after in (20, 45, 70):
            run(server, "killed", kill_after)
        run(server, "killed")
    answered = [call.prompt for call in server.calls if call.answered]
    # What was answered but not yet read when the process died is all that may be asked twice: 4 calls a kill.
    assert len(answered) - len(set(answered)) <= 3 * 4
    assert len(answered) <= n_whole + 3 * 4
    assert json.loads((tmp_path / "killed").read_text()) == json.loads((tmp_path / "whole").read_text())


# --- Secrets and logs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["openai", "anthropic", "openrouter"])
def test_a_key_is_in_no_log_cache_error_or_dump(server, tmp_path, provider, caplog):
    server.brain = lambda *_: {"reasoning": f"your key is {KEY}", "decision": "same"}
    caplog.set_level("DEBUG")
    settings = server.settings(provider, cache_path=str(tmp_path / "cache.sqlite"))
    with LlmClient(settings, prompts_path=tmp_path / "prompts.jsonl") as client:
        assert client.answer(question()).value.reasoning == "your key is ***"
        server.enqueue(fault("status", status=401, body={"error": {"message": f"wrong: {KEY}"}}))
        with pytest.raises(UserError) as raised:
            client.answer(question(1))
    assert server.calls[0].headers["Authorization"] == f"Bearer {KEY}"
    dumps = [str(raised.value), repr(settings), str(settings.model_dump()), repr(vars(client)), caplog.text]
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(files) >= 2
    assert not any(KEY in text for text in dumps) and not any(KEY.encode() in content for content in files)


def test_the_prompt_log_holds_every_prompt_and_answer(server, tmp_path):
    path = tmp_path / "prompts" / "batch-001.jsonl"
    server.enqueue(rate_limited(), fault("prose"))
    with client_of(server, prompts_path=path, prices={"default": {"input": 1, "output": 2}}) as client:
        client.answer(question())
        client.answer(question())
    path.write_bytes(path.read_bytes() + b'{"cut": ')  # killed while it wrote
    with client_of(server, prompts_path=path) as client:
        client.answer(question(1))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines.pop(6) == '{"cut": '
    records = [json.loads(line) for line in lines]
    kinds = [(record["schema"], record.get("failure"), record["cached"]) for record in records[:6]]
    assert kinds == [
        ("preflight", None, False),
        ("merge", "rate_limited", False),
        ("merge", None, False),
        ("merge", None, False),
        ("merge", None, True),
        ("merge", None, True),
    ]
    answered = records[3]
    assert answered["messages"][0]["content"].startswith("schema: merge") and json.loads(answered["answer"]) == SAME
    assert answered["latency_s"] >= 0 and answered["tokens_in"] > 0 and answered["cost"] > 0

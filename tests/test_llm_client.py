"""The one policy over all providers: what is cached, counted, limited, retried, validated, and what ends a run."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from llm_servers import KEY, LlmServer, fault, rate_limited, rates

from common.config import ConfigError, UserError
from llm_parts.answers import InvalidAnswer, parse_answer
from llm_parts.client import (
    PROVIDERS,
    BaseLLMProvider,
    BudgetExhausted,
    LlmClient,
    LlmRequest,
    LlmSettings,
    Settings,
    get_llm_provider,
)
from llm_parts.schemas import JudgeAnswer, MergeAnswer, ProposerAnswer, json_schema
from llm_parts.settings import Price, read_dotenv
from llm_parts.wires.base import Reply

ROOT = Path(__file__).resolve().parents[1]
SAME = {"reasoning": "one procedure", "decision": "same"}


def same(name, messages, schema):
    return SAME


def question(number=0, **keys):
    messages = [{"role": "system", "content": "Compare."}, {"role": "user", "content": f"pair {number}"}]
    return LlmRequest(messages, MergeAnswer, "merge", step="merge", **keys)


def decision(cluster_id="c-1", **changes):
    kept = {"request_id": "r1", "decision": "assign", "cluster_id": cluster_id, "confidence": 0.9, "rationale": "fits"}
    return {"decisions": [{**kept, **changes}]}


def judge_question(text="my card is lost"):
    messages = [{"role": "user", "content": text}]
    return LlmRequest(messages, JudgeAnswer, "judge", step="judge", choices={"cluster_id": ["c-1", "c-2"]})


@pytest.fixture
def server():
    with LlmServer(same) as running:
        yield running


def client_of(server, provider="triton", **keys):
    """A client of the lightest wire; the policy is the same over all."""
    options = {name: keys.pop(name) for name in ("prompts_path", "default_cache_path") if name in keys}
    return LlmClient(server.settings(provider, **keys), **options)


# --- Answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_is_a_validated_model(server):
    with client_of(server) as client:
        answer = client.answer(question())
    assert answer.ok and answer.value == MergeAnswer(reasoning="one procedure", decision="same")
    assert answer.failure is None and not answer.cached


def test_the_name_of_the_schema_opens_the_prompt_and_the_instruction_closes_it(server):
    with client_of(server, provider="openai") as client:
        client.answer(question())
        client.ask([{"role": "user", "content": "no system"}], schema=MergeAnswer, schema_name="merge", step="merge")
    first, second = (call.messages for call in server.work())
    assert first[0]["content"] == "schema: merge\n\nCompare."
    assert first[-1]["content"].startswith("pair 0\n\n") and first[-1]["content"].rstrip(".").endswith(
        "one JSON object"
    )
    assert second[0] == {"role": "system", "content": "schema: merge"}


@pytest.mark.parametrize("dressed", ["fenced", "think"])
def test_fences_and_thoughts_are_stripped(server, dressed):
    server.enqueue(fault(dressed))
    with client_of(server) as client:
        assert client.answer(question()).value.decision == "same"
        assert client.ledger.summary()["failures"] == {"attempts": {}, "quarantined": 0}


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (fault("malformed"), "invalid_json"),
        (fault("prose"), "invalid_json"),
        (fault("empty"), "empty"),
        (fault("text", text='{"reasoning": "x", "decision": "maybe"}'), "schema"),
        (fault("huge"), "too_long"),
    ],
)
def test_an_unusable_answer_is_asked_for_once_more_with_the_error_shown(server, spoil, kind):
    server.enqueue(spoil)
    with client_of(server) as client:
        answer = client.answer(question())
        summary = client.ledger.summary()
    assert answer.ok
    assert summary["failures"] == {"attempts": {kind: 1}, "quarantined": 0}
    assert server.n_calls() == 2
    assert "Your answer cannot be used:" in server.work()[1].prompt
    assert len(server.work()[1].prompt) < 10_000


def test_after_the_second_unusable_answer_the_call_is_quarantined(server):
    server.enqueue(fault("prose"), fault("malformed"))
    with client_of(server) as client:
        answer = client.answer(question())
        assert client.answer(question(1)).ok
        summary = client.ledger.summary()
    assert answer.value is None and answer.failure.kind == "invalid_json" and answer.failure.n_attempts == 2
    assert summary["failures"] == {"attempts": {"invalid_json": 2}, "quarantined": 1}
    assert summary["steps"]["merge"]["calls"] == 3


def test_ids_that_were_not_offered_are_refused_and_stand_as_an_enum_in_the_schema(server):
    said = iter([decision("c-9"), decision("c-2")])
    server.brain = lambda *_: next(said)
    with client_of(server, provider="openai") as client:
        answer = client.answer(judge_question())
        assert client.ledger.summary()["failures"]["attempts"] == {"invented_value": 1}
    assert answer.value.decisions[0].cluster_id == "c-2"
    sent = server.work()[0].schema["properties"]["decisions"]["items"]["properties"]
    assert sent["cluster_id"] == {"anyOf": [{"type": "string", "enum": ["c-1", "c-2"]}, {"type": "null"}]}
    assert "'c-9'" in server.work()[1].messages[-1]["content"]


@pytest.mark.parametrize("wrong", [{"confidence": 1.5}, {"confidence": "high"}, {"decision": "perhaps"}])
def test_bounds_are_checked_here_and_not_sent(server, wrong):
    said = iter([decision(**wrong), decision()])
    server.brain = lambda *_: next(said)
    with client_of(server, provider="openai") as client:
        assert client.answer(judge_question()).value.decisions[0].confidence == 0.9
        assert client.ledger.summary()["failures"]["attempts"] == {"schema": 1}
    assert "maximum" not in json.dumps(server.work()[0].schema)


def test_a_cut_off_answer_gets_twice_the_room(server):
    server.enqueue(fault("truncated"))
    with client_of(server, provider="ollama", max_answer_tokens=100) as client:
        assert client.answer(question()).ok
        assert client.ledger.summary()["failures"]["attempts"] == {"truncated": 1}
    assert [call.body["options"]["num_predict"] for call in server.work()] == [100, 200]


def test_a_refusal_is_counted_as_one(server):
    server.enqueue(fault("refusal"), fault("refusal"))
    with client_of(server, provider="anthropic") as client:
        assert client.answer(question()).failure.kind == "refusal"


@pytest.mark.parametrize(
    "text",
    [
        '{"reasoning": "r", "decision": "same"}',
        '\ufeff  {"reasoning": "r", "decision": "same"}\n',
        'Sure!\n```json\n{"reasoning": "r", "decision": "same"}\n```',
        '```\n{"reasoning": "r", "decision": "same"}\n```',
        'A draft: {"reasoning": "r", "decision": "different"} and now: {"reasoning": "r", "decision": "same"}',
        '<think>{"reasoning": "r", "decision": "different"}</think>{"reasoning": "r", "decision": "same"}',
        'thoughts without a head {"decision": 1}</think> {"reasoning": "r", "decision": "same"}',
        '{"reasoning": "the customer wrote </think> and ```json", "decision": "same"}',
        '{"reasoning": "r", "decision": "same", "extra": [1, 2]}',
        '{"a": {"b": 1}} {"reasoning": "r", "decision": "same"} {not json',
    ],
)
def test_the_answer_is_found_wherever_it_stands(text):
    assert parse_answer(Reply(text), schema=MergeAnswer).decision == "same"


@pytest.mark.parametrize("text", ["{" * 200_000, "[" * 200_000, '{"a":' * 100_000, "null", "[]", '"{}"', "{}", "\x00"])
def test_a_hostile_text_is_an_invalid_answer_and_nothing_worse(text):
    with pytest.raises(InvalidAnswer):
        parse_answer(Reply(text), schema=MergeAnswer)


def test_lone_surrogates_become_a_replacement_character():
    answer = parse_answer(Reply('{"reasoning": "\\ud83d", "decision": "same"}'), schema=MergeAnswer)
    assert answer.reasoning == "\ufffd"


def test_the_schema_that_is_sent_has_no_bounds_no_references_and_requires_all():
    schema = json_schema(ProposerAnswer, schema_name="proposer", choices={"request_ids": ["r1"]})
    text = json.dumps(schema)
    assert not any(word in text for word in ("$ref", "$defs", "minLength", "minimum"))
    cluster = schema["properties"]["clusters"]["items"]
    assert cluster["required"] == ["name", "summary", "criteria", "request_ids"]
    assert cluster["additionalProperties"] is False
    assert cluster["properties"]["request_ids"] == {"type": "array", "items": {"type": "string", "enum": ["r1"]}}
    with pytest.raises(ValueError, match="no field 'colour'"):
        json_schema(ProposerAnswer, schema_name="proposer", choices={"colour": ["red"]})


# --- Retries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (fault("status", status=408), "timeout"),
        (fault("status", status=409), "server_error"),
        (rate_limited(), "rate_limited"),
        (fault("status", status=500), "server_error"),
        (fault("status", status=529, body="<html>busy</html>"), "server_error"),
        (fault("drop"), "dropped"),
        (fault("half"), "dropped"),
        (fault("html"), "bad_reply"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.kind}-{value.status}",
)
@pytest.mark.parametrize("provider", ["openai", "anthropic", "ollama", "triton"])
def test_what_passes_is_sent_again(server, provider, trouble, kind):
    server.enqueue(trouble, trouble)
    with client_of(server, provider=provider) as client:
        answer = client.answer(question())
        assert client.ledger.summary()["failures"] == {"attempts": {kind: 2}, "quarantined": 0}
    assert answer.ok and server.n_calls() == 3


def test_retry_after_is_obeyed(server):
    server.enqueue(rate_limited("0.4"))
    with client_of(server, provider="ollama") as client:  # whose client drops the headers of an error
        client.preflight()
        started = time.monotonic()
        assert client.answer(question()).ok
    assert time.monotonic() - started >= 0.4


def test_a_slow_answer_times_out_and_is_asked_again(server):
    server.enqueue(fault("slow", seconds=1.0))
    with client_of(server, timeout_s=0.3) as client:
        assert client.answer(question()).ok
        assert client.ledger.summary()["failures"]["attempts"] == {"timeout": 1}


def test_a_wait_that_is_too_long_ends_the_run(server):
    server.enqueue(rate_limited("3600"))
    with client_of(server) as client, pytest.raises(UserError, match=r"asks to wait 3600 s.*max_retry_wait_s"):
        client.answer(question())
    assert server.n_calls() == 1


@pytest.mark.parametrize(
    ("status", "body", "advice"),
    [
        (400, {"error": {"message": "context too long"}}, "does not take the request: HTTP 400: context too long"),
        (401, {"error": {"message": f"bad key {KEY}"}}, "set OPENAI_API_KEY"),
        (403, {"error": {"message": "not yours"}}, "set OPENAI_API_KEY"),
        (404, {"error": {"message": "no such model"}}, "set llm.model"),
        (429, {"error": {"message": "You exceeded it", "code": "insufficient_quota"}}, "no quota left"),
        (402, {"error": {"message": "pay"}}, "no quota left"),
    ],
)
def test_what_the_user_must_mend_ends_the_run_at_once(server, status, body, advice):
    server.enqueue(fault("status", status=status, body=body))
    with client_of(server, provider="openai") as client, pytest.raises(UserError) as raised:
        client.ask_many([question(number) for number in range(30)])
    assert advice in str(raised.value) and KEY not in str(raised.value)
    assert sum(call.fault is not None for call in server.calls) == 1
    assert server.n_calls() <= 2 * 8  # what was in flight by then, and what took its places meanwhile


def test_no_server():
    settings = LlmSettings(provider="ollama", url="http://127.0.0.1:9", retry_wait_s=0)
    with LlmClient(settings) as client, pytest.raises(UserError, match=r"cannot be reached.*start the server"):
        client.preflight()


def test_no_key(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with pytest.raises(UserError, match="ANTHROPIC_API_KEY is not set"):
        LlmClient(LlmSettings(provider="anthropic")).preflight()


def test_a_call_without_any_answer_is_quarantined_and_the_run_goes_on(server):
    server.faults = lambda call, n_seen: fault("drop") if "pair 3" in call.prompt else None
    with client_of(server, concurrency=1, max_attempts=2) as client:
        answers = client.ask_many([question(number) for number in range(6)])
        summary = client.ledger.summary()
    assert [answer.ok for answer in answers] == [True, True, True, False, True, True]
    assert answers[3].failure.kind == "dropped" and answers[3].failure.n_attempts == 2
    assert summary["failures"] == {"attempts": {"dropped": 2}, "quarantined": 1}


def test_a_server_that_has_gone_ends_the_run(server):
    server.faults = lambda call, n_seen: fault("status", status=503)
    client = client_of(server, concurrency=1, max_attempts=2)
    with client, pytest.raises(UserError, match="has stopped answering"):
        client.ask_many([question(number) for number in range(50)])
    assert 3 * 2 <= server.n_calls() <= 4 * 2  # each of them retried, and what a second thread had begun


# --- Preflight -------------------------------------------------------------------------------------------------------


def test_preflight_leaves_out_what_the_model_does_not_take_and_is_remembered(server, tmp_path):
    server.refuses = {
        "max_completion_tokens": "Unsupported parameter: 'max_completion_tokens'",
        "temperature": "`temperature` is not supported by this model",
    }
    keys = {"provider": "openai", "cache_path": str(tmp_path / "cache.sqlite")}
    with client_of(server, **keys) as client:
        client.preflight()
        assert client.answer(question()).ok
    body = server.work()[0].body
    assert "temperature" not in body and body["max_tokens"] == 4096
    n_before = len(server.calls)
    with client_of(server, **keys) as client:
        client.preflight()
        assert client.answer(question(1)).ok
    assert len(server.calls) == n_before + 1


@pytest.mark.parametrize(
    ("provider", "modes"),
    [
        ("openai", ["schema", "tool", "prompt"]),
        ("anthropic", ["schema", "tool", "prompt"]),
        ("ollama", ["schema", "prompt"]),
    ],
)
def test_a_schema_that_is_ignored_goes_into_the_prompt(server, provider, modes):
    server.ignore_schema = True
    with client_of(server, provider=provider) as client:
        assert client.answer(question()).ok
    assert [call.mode for call in server.calls if call.schema_name == "preflight"] == modes[:-1]
    asked = server.work()[0]
    assert asked.mode == "prompt" and '"additionalProperties":false' in asked.prompt


def test_a_schema_that_is_refused_becomes_a_forced_tool(server):
    server.refuses = {"response_format": "response_format json_schema is not supported"}
    with client_of(server, provider="openrouter") as client:
        assert client.answer(question()).ok
    assert server.work()[0].mode == "tool"


def test_a_busy_server_at_preflight_does_not_stop_the_run(server, caplog):
    asked = []
    real = server.arrive

    def arrive(call):
        drawn = real(call)
        asked.append(call)
        return fault("status", status=503) if call.schema_name == "preflight" else drawn

    server.arrive = arrive
    with client_of(server, max_attempts=2) as client:
        assert client.answer(question()).ok
    assert len(asked) == 3


# --- Cache -----------------------------------------------------------------------------------------------------------


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


# --- Budget ----------------------------------------------------------------------------------------------------------


def test_a_budget_of_calls_stops_and_a_higher_one_goes_on_without_repeating(server, tmp_path):
    questions = [question(number) for number in range(40)]
    keys = {"cache_path": str(tmp_path / "cache.sqlite"), "concurrency": 4}
    said = r"llm.max_calls=15 is used up.*of 40 requests.*are left"
    with client_of(server, max_calls=15, **keys) as client, pytest.raises(BudgetExhausted, match=said) as stopped:
        client.ask_many(questions)
    assert len(server.calls) == 15 and stopped.value.exit_code == 1
    assert stopped.value.n_left == 40 - server.n_calls()  # the preflight is a call too
    with client_of(server, max_calls=100, **keys) as client:
        assert all(answer.ok for answer in client.ask_many(questions))
    assert server.n_calls() == 40 and len({call.prompt for call in server.work()}) == 40


@pytest.mark.parametrize("limit", [{"max_tokens": 2000}, {"max_cost": 0.002}])
def test_budgets_of_tokens_and_money(server, limit):
    prices = {"test-model": Price(input=1.0, output=1.0)}
    with client_of(server, concurrency=2, prices=prices, **limit) as client:
        with pytest.raises(BudgetExhausted, match=next(iter(limit))):
            client.ask_many([question(number) for number in range(100)])
        summary = client.ledger.summary()
    used = summary["tokens_in"] + summary["tokens_out"]
    assert 1000 < used <= 2000 and summary["cost"] == pytest.approx(used / 1e6)


def test_retries_count_as_calls(server):
    server.faults = lambda call, n_seen: rate_limited()
    with client_of(server, max_calls=5, max_attempts=20) as client, pytest.raises(BudgetExhausted):
        client.answer(question())
    assert len(server.calls) == 5


def test_a_limit_of_money_needs_a_price():
    with pytest.raises(ValueError, match="price of 'gpt-5-mini' is not known"):
        LlmSettings(provider="openai", max_cost=1.0)
    assert LlmSettings(provider="ollama", max_cost=1.0).price == Price(input=0, output=0)


def test_an_estimate_needs_neither_server_nor_key():
    settings = LlmSettings(provider="openai", prices={"gpt-5-mini": {"input": 2.0, "output": 10.0}})
    estimate = LlmClient(settings).estimate("judge", n_calls=1000, tokens_in=1_000_000, tokens_out=50_000)
    assert (estimate.n_calls, estimate.cost) == (1000, pytest.approx(2.5))


# --- Concurrency -----------------------------------------------------------------------------------------------------


def test_the_limit_is_used_and_never_passed(server):
    server.delay_s = 0.1
    with client_of(server, concurrency=10) as client:
        client.ask_many([question(number) for number in range(100)])
    assert server.max_in_flight == 10
    assert server.mean_in_flight > 5


def test_answers_are_in_the_order_of_the_questions_and_equal_for_any_concurrency():
    def brain(name, messages, schema):
        text = messages[-1]["content"] if len(messages) < 3 else messages[1]["content"]
        number = next(int(word) for word in text.split() if word.isdigit())
        time.sleep(0.001 * (7 - number % 7))
        return {"reasoning": str(number), "decision": ("same", "different")[number % 2]}

    results = []
    for concurrency in (1, 7):
        with LlmServer(brain, faults=rates(malformed=0.15, rate_limited=0.1, dropped=0.05)) as server:
            seen = []
            with client_of(server, provider="openai", concurrency=concurrency) as client:
                questions = [question(number) for number in range(60)]
                answers = client.ask_many(questions, on_answer=lambda index, answer, seen=seen: seen.append(index))
                results.append(([(a.value, a.failure) for a in answers], client.ledger.summary()["failures"]))
            assert sorted(seen) == list(range(60))
    assert results[0] == results[1]
    assert [value.reasoning for value, _ in results[0][0] if value] == [
        str(number) for number, (value, _) in enumerate(results[0][0]) if value
    ]
    assert set(results[0][1]["attempts"]) >= {"invalid_json", "rate_limited", "dropped"}


def test_requests_per_minute_are_kept(server):
    with client_of(server, requests_per_minute=1200) as client:  # one each 50 ms, after a burst of a second's worth
        client.preflight()
        started = time.monotonic()
        client.ask_many([question(number) for number in range(30)])
    assert time.monotonic() - started >= 0.4


def test_a_client_is_shared_between_threads(server):
    with client_of(server, concurrency=3) as client:
        threads = [
            threading.Thread(target=client.ask_many, args=([question(10 * t + n) for n in range(10)],))
            for t in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert client.ledger.summary()["steps"]["merge"]["answered"] == 40
    assert server.max_in_flight <= 3
    assert sum(call.schema_name == "preflight" for call in server.calls) == 1


# --- Killed and run again --------------------------------------------------------------------------------------------

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


# --- Secrets and logs ------------------------------------------------------------------------------------------------


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


# --- One's own provider, and settings --------------------------------------------------------------------------------


class Parrot(BaseLLMProvider):
    def __init__(self, *texts):
        self.texts = list(texts)
        self.seen = []

    def chat_completion(self, messages, temperature=None, max_tokens=None):
        self.seen.append((messages, temperature, max_tokens))
        text = self.texts.pop(0)
        if isinstance(text, Exception):
            raise text
        return text


def test_a_subclass_with_only_chat_completion_is_retried_validated_and_cached():
    parrot = Parrot(ConnectionResetError("gone"), "no idea", f"```json\n{json.dumps(SAME)}\n```")
    with LlmClient(LlmSettings(retry_wait_s=0.001), provider=parrot) as client:
        assert client.answer(question()).ok and client.answer(question()).cached
        assert client.ledger.summary()["failures"]["attempts"] == {"dropped": 1, "invalid_json": 1}
    messages, temperature, max_tokens = parrot.seen[0]
    assert temperature == 0.0 and max_tokens == 4096
    assert messages[0]["content"].startswith("schema: merge") and "JSON schema" in messages[-1]["content"]


def test_an_error_of_ones_own_provider_keeps_its_traceback():
    client = LlmClient(LlmSettings(), provider=Parrot(ZeroDivisionError("theirs")))
    with client, pytest.raises(ZeroDivisionError, match="theirs"):
        client.ask_many([question()])
    with (
        LlmClient(LlmSettings(), provider=Parrot(None)) as client,
        pytest.raises(UserError, match="must return the text"),
    ):
        client.answer(question())


def test_providers_are_found_by_name_and_added_to(monkeypatch):
    parrot = Parrot(json.dumps(SAME))
    monkeypatch.setitem(PROVIDERS, "parrot", lambda settings: parrot)
    assert get_llm_provider("parrot") is parrot
    assert LlmClient(LlmSettings(provider="parrot")).answer(question()).value.decision == "same"
    for find in (get_llm_provider, lambda name: LlmClient(LlmSettings(provider=name))):
        with pytest.raises(UserError, match="did you mean 'ollama'"):
            find("olama")


def test_settings_come_from_arguments_then_environment_then_dotenv(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "OLLAMA_MODEL", "CLUSTERING_BATCH_SIZE"):
        monkeypatch.delenv(name, raising=False)
    Path(".env").write_text(
        f"# a comment\nexport OPENAI_API_KEY='{KEY}'  # mine\nOLLAMA_MODEL=from-file\nCLUSTERING_BATCH_SIZE=7\n"
        "DEFAULT_TEMPERATURE=0.0\nJUDGE_SHORTLIST=all\nLANGUAGE=en_US:en\n"
    )
    monkeypatch.setenv("CLUSTERING_BATCH_SIZE", "8")
    settings = Settings(default_llm_provider="openai", max_clusters_per_batch=3)
    assert (settings.ollama_model, settings.clustering_batch_size) == ("from-file", 8)
    assert settings.judge_shortlist == "all" and settings.default_temperature == 0.0
    assert KEY not in repr(settings) and KEY not in settings.model_dump_json()
    section = settings.llm_settings()
    assert section.api_key().get_secret_value() == KEY and section.model_name == "gpt-5-mini"
    assert settings.llm_settings("ollama").base_url == "http://localhost:11434/api"
    assert LlmSettings(provider="openai").api_key().get_secret_value() == KEY
    monkeypatch.setenv("OPENAI_BASE_URL", "http://gateway/v1")
    assert LlmSettings(provider="openai").base_url == "http://gateway/v1" == settings.llm_settings().base_url
    assert LlmSettings(provider="openai", url="http://mine").base_url == "http://mine"
    with pytest.raises(ConfigError, match="clustering_batch_size"):
        Settings(clustering_batch_size=0)


def test_dotenv_lines(tmp_path):
    path = tmp_path / ".env"
    path.write_text('A=1 # one\nB="two # 2"\n#C=3\n D = four words \nE=\nno line\n')
    assert read_dotenv(path) == {"A": "1", "B": "two # 2", "D": "four words", "E": ""}
    assert read_dotenv(tmp_path / "missing") == {}


def test_env_example_lists_every_setting_and_nothing_else():
    listed = {
        line.split("=")[0].lstrip("# ").lower()
        for line in (ROOT / "env.example").read_text().splitlines()
        if "=" in line
    }
    assert listed == set(Settings.model_fields)

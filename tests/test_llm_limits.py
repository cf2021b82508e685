"""What is tried again, what ends a run, and what a budget allows."""

from __future__ import annotations

import time

import pytest
from llm_questions import client_of, question, same
from llm_servers import KEY, LlmServer, fault, rate_limited

from common.config import UserError
from llm_parts.client import (
    BudgetExhausted,
    LlmClient,
    LlmSettings,
)
from llm_parts.settings import Price


@pytest.fixture
def server():
    with LlmServer(same) as running:
        yield running


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


# --- Budget -----------------------------------------------------------------------------------------------------------


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

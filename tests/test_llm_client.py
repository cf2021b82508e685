"""Questions to answers: validation, the second try, preflight, concurrency, and providers of one's own."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from llm_questions import SAME, client_of, decision, judge_question, question, same
from llm_servers import KEY, LlmServer, fault, rates

from common.config import ConfigError, UserError
from llm_parts.client import (
    PROVIDERS,
    BaseLLMProvider,
    LlmClient,
    LlmSettings,
    Settings,
    get_llm_provider,
)
from llm_parts.schemas import MergeAnswer
from llm_parts.settings import read_dotenv

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def server():
    with LlmServer(same) as running:
        yield running


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


# --- Preflight --------------------------------------------------------------------------------------------------------


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


# --- Concurrency ------------------------------------------------------------------------------------------------------


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


# --- One's own provider, and settings ---------------------------------------------------------------------------------


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

"""Wire formats: what each provider is sent, to the field, and what is made of its replies."""

from __future__ import annotations

import json
import shutil

import pytest
from llm_servers import KEY, LlmServer, fault

from common.config import UserError
from llm_parts.client import LlmClient, LlmRequest, LlmSettings, get_llm_provider
from llm_parts.schemas import MergeAnswer, json_schema
from llm_parts.settings import TritonTensors
from llm_parts.wires.base import Capabilities, WireCall, is_loopback, shown_url, with_path
from llm_parts.wires.errors import WireError, retry_after_seconds, status_error
from llm_parts.wires.triton_wire import render_prompt

SAME = {"reasoning": "ein Grund, и причина", "decision": "same"}
MESSAGES = [{"role": "system", "content": "Compare."}, {"role": "user", "content": "one pair"}]
SCHEMA = json_schema(MergeAnswer, schema_name="merge")

EVERY_WIRE = [
    ("openai", {}),
    ("openrouter", {}),
    ("anthropic", {}),
    ("ollama", {}),
    ("triton", {"triton_api": "generate"}),
    ("triton", {"triton_api": "openai"}),
    ("triton", {"triton_api": "infer"}),
]
every_wire = pytest.mark.parametrize(("provider", "keys"), EVERY_WIRE, ids=lambda value: str(value) if value else "-")


@pytest.fixture
def server():
    with LlmServer(lambda *_: SAME) as running:
        yield running


def wire_of(server, provider, **keys):
    return get_llm_provider(provider, server.settings(provider, **keys))


def call_of(**changes):
    given = {"messages": MESSAGES, "schema": SCHEMA, "schema_name": "merge", "temperature": 0.0, "max_tokens": 77}
    return WireCall(**{**given, **changes})


@every_wire
def test_a_question_goes_round(server, provider, keys):
    with LlmClient(server.settings(provider, **keys)) as client:
        answer = client.answer(LlmRequest(MESSAGES, MergeAnswer, "merge", step="merge"))
        steps = client.ledger.summary()["steps"]
    assert answer.value.reasoning == SAME["reasoning"] and answer.value.decision == "same"
    assert set(steps) == {"preflight", "merge"} and steps["merge"]["tokens_in"] > 0 < steps["merge"]["tokens_out"]
    assert [call.schema_name for call in server.calls] == ["preflight", "merge"]


@every_wire
@pytest.mark.parametrize("temperature", [0.0, 0.7, None])
def test_temperature_is_sent_as_it_stands(server, provider, keys, temperature):
    wire = wire_of(server, provider, temperature=temperature, **keys)
    wire.send(call_of(temperature=temperature), wire.capabilities)
    body = server.calls[-1].body
    tensors = {tensor["name"]: tensor["data"][0] for tensor in body.get("inputs", ())}
    places = (body, body.get("options", {}), body.get("parameters", {}), tensors)
    sent = [place["temperature"] for place in places if "temperature" in place]
    assert sent == ([] if temperature is None else [temperature])


@every_wire
def test_chat_completion_is_one_plain_call(server, provider, keys):
    wire = wire_of(server, provider, temperature=0.0, **keys)
    assert json.loads(wire.chat_completion(MESSAGES)) == SAME
    assert json.loads(wire.chat_completion(MESSAGES, temperature=0.5, max_tokens=9)) == SAME
    assert all(call.schema is None for call in server.calls)


def test_openai_body_in_its_three_modes(server):
    wire = wire_of(server, "openai")
    for mode in ("schema", "tool", "prompt"):
        reply = wire.send(call_of(top_p=0.9), Capabilities(mode=mode, token_limit="max_completion_tokens"))
        assert json.loads(reply.text) == SAME and reply.tokens_in > 0 and reply.tokens_out > 0
    by_schema, by_tool, by_prompt = (call.body for call in server.calls)
    common = {
        "model": "test-model",
        "messages": MESSAGES,
        "max_completion_tokens": 77,
        "temperature": 0.0,
        "top_p": 0.9,
    }
    form = {"name": "merge", "strict": True, "schema": SCHEMA}
    assert by_schema == {**common, "response_format": {"type": "json_schema", "json_schema": form}}
    assert by_tool["tools"][0]["function"]["parameters"] == SCHEMA
    assert by_tool["tool_choice"] == {"type": "function", "function": {"name": "merge"}}
    assert by_prompt == common
    assert server.calls[0].headers["Authorization"] == f"Bearer {KEY}"


def test_openrouter_takes_no_route_that_drops_a_parameter(server):
    wire = wire_of(server, "openrouter")
    wire.send(call_of(), wire.capabilities)
    assert server.calls[0].path == "/api/v1/chat/completions"
    assert server.calls[0].body["provider"] == {"require_parameters": True}
    assert server.calls[0].body["max_tokens"] == 77


@pytest.mark.parametrize(
    ("code", "kind"), [(429, "rate_limited"), (502, "server_error"), (401, "auth"), (None, "server_error")]
)
def test_an_error_inside_a_200_is_an_error(server, code, kind, monkeypatch):
    body = {"error": {"message": "no luck upstream", "code": code}}
    monkeypatch.setattr("llm_servers.write_reply", lambda *_: body)
    wire = wire_of(server, "openrouter")
    with pytest.raises(WireError, match="no luck upstream") as raised:
        wire.send(call_of(), wire.capabilities)
    assert raised.value.kind == kind


def test_anthropic_body_in_its_three_modes(server):
    wire = wire_of(server, "anthropic")
    for mode in ("schema", "tool", "prompt"):
        assert json.loads(wire.send(call_of(), Capabilities(mode=mode)).text) == SAME
    by_schema, by_tool, by_prompt = (call.body for call in server.calls)
    turns = [{"role": "user", "content": "one pair"}]
    common = {"model": "test-model", "max_tokens": 77, "system": "Compare.", "messages": turns, "temperature": 0.0}
    assert by_schema == {**common, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    assert by_tool["tools"][0]["input_schema"] == SCHEMA
    assert by_tool["tool_choice"] == {"type": "tool", "name": "merge"}
    assert by_prompt == common


def test_ollama_body(server):
    wire = wire_of(server, "ollama", num_ctx=2048, think=False, seed=5)
    reply = wire.send(call_of(), wire.capabilities)
    assert json.loads(reply.text) == SAME and reply.tokens_in > 0
    body = server.calls[0].body
    assert body["format"] == SCHEMA and body["stream"] is False and body["think"] is False
    assert body["options"] == {"num_predict": 77, "num_ctx": 2048, "temperature": 0.0, "seed": 5}
    assert body["keep_alive"] == "10m"


def test_the_context_of_ollama_grows_with_the_prompt_instead_of_cutting_it(server):
    wire = wire_of(server, "ollama", num_ctx=1024)
    for text in ("short", "long " * 4000, "short"):
        wire.send(call_of(messages=[{"role": "user", "content": text}]), wire.capabilities)
    assert [call.body["options"]["num_ctx"] for call in server.calls] == [1024, 8192, 8192]


def test_triton_generate_body_and_a_prompt_that_comes_back(server, monkeypatch):
    wire = wire_of(server, "triton", triton_api="generate")
    monkeypatch.setattr(
        "llm_servers.write_reply", lambda call, text, finish: {"text_output": call.body["text_input"] + text}
    )
    assert json.loads(wire.send(call_of(), wire.capabilities).text) == SAME
    call = server.calls[0]
    assert call.path == "/v2/models/test-model/generate"
    assert call.body == {
        "text_input": "System:\nCompare.\n\nUser:\none pair\n\nAssistant:\n",
        "parameters": {"stream": False, "max_tokens": 77, "temperature": 0.0},
        "exclude_input_in_output": True,
    }


def test_triton_openai_forces_a_tool(server):
    wire = wire_of(server, "triton", triton_api="openai")
    assert json.loads(wire.send(call_of(), wire.capabilities).text) == SAME
    assert server.calls[0].mode == "tool" and "response_format" not in server.calls[0].body


def test_triton_infer_with_tensors_of_other_names(server):
    tensors = TritonTensors(text="PROMPT", max_tokens="LEN", temperature=None, response="OUT", shape=(1, 1))
    wire = wire_of(server, "triton", triton_api="infer", triton_tensors=tensors, chat_template="chatml")
    assert json.loads(wire.send(call_of(), wire.capabilities).text) == SAME
    prompt, length = server.calls[0].body["inputs"]
    assert prompt["name"] == "PROMPT" and prompt["shape"] == [1, 1] and prompt["datatype"] == "BYTES"
    assert prompt["data"][0].endswith("<|im_start|>user\none pair<|im_end|>\n<|im_start|>assistant\n")
    assert length == {"name": "LEN", "shape": [1, 1], "datatype": "INT32", "data": [77]}
    assert server.calls[0].body["outputs"] == [{"name": "OUT"}]


def test_a_tensor_that_is_not_there_is_named(server, monkeypatch):
    monkeypatch.setattr("llm_servers.write_reply", lambda *_: {"outputs": [{"name": "text_out", "data": ["x"]}]})
    wire = wire_of(server, "triton", triton_api="infer")
    with pytest.raises(WireError, match=r"no tensor 'response' \(has: \['text_out'\]\); see llm.triton_tensors"):
        wire.send(call_of(), wire.capabilities)


@every_wire
def test_a_body_of_nonsense_is_a_bad_reply(server, provider, keys, monkeypatch):
    wire = wire_of(server, provider, **keys)
    for body in ({}, {"choices": None, "outputs": 3}, "[1, 2]", '"text"', "null"):
        monkeypatch.setattr("llm_servers.write_reply", lambda *_, body=body: body)
        try:
            reply = wire.send(call_of(), wire.capabilities)
        except WireError as error:
            assert error.kind == "bad_reply"
        else:
            assert reply.text == ""  # a reply without an answer in it


@pytest.mark.parametrize(("provider", "finish"), [("openai", "length"), ("anthropic", "length"), ("ollama", "length")])
def test_a_cut_off_answer_says_so(server, provider, finish):
    server.enqueue(fault("truncated"))
    wire = wire_of(server, provider)
    assert wire.send(call_of(), wire.capabilities).finish == finish


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_refusal_says_so(server, provider):
    server.enqueue(fault("refusal"))
    wire = wire_of(server, provider)
    assert wire.send(call_of(), wire.capabilities).finish == "refusal"


@pytest.mark.parametrize(
    ("provider", "keys", "path", "sent_to"),
    [
        ("openai", {}, "", "/v1/chat/completions"),
        ("openai", {}, "/v1/", "/v1/chat/completions"),
        ("openai", {}, "/v1/chat/completions", "/v1/chat/completions"),
        ("openrouter", {}, "", "/api/v1/chat/completions"),
        ("anthropic", {}, "/v1", "/v1/messages"),
        ("anthropic", {}, "/v1/messages", "/v1/messages"),
        ("ollama", {}, "/api", "/api/chat"),
        ("ollama", {}, "/api/chat/", "/api/chat"),
        ("triton", {}, "/v2", "/v2/models/test-model/generate"),
        ("triton", {}, "/v2/models/test-model/generate", "/v2/models/test-model/generate"),
        ("triton", {"triton_api": "openai"}, "", "/v1/chat/completions"),
    ],
)
def test_every_way_to_write_an_address(server, provider, keys, path, sent_to):
    wire = wire_of(server, provider, url=f"http://127.0.0.1:{server.port}{path}", **keys)
    wire.send(call_of(), wire.capabilities)
    assert server.calls[0].path == sent_to


def test_addresses():
    assert with_path("localhost:8000", wanted="/v1") == "http://localhost:8000/v1"
    assert shown_url("https://me:secret@host:1/v1?key=k") == "https://host:1/v1"
    assert (
        is_loopback("http://127.0.0.1:1") and is_loopback("http://[::1]/") and not is_loopback("https://api.openai.com")
    )
    with pytest.raises(UserError, match="no address of a server"):
        with_path("ftp://host/", wanted="")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "2"}, 2.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"Retry-After-Ms": "250", "Retry-After": "9"}, 0.25),
        ({"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after(headers, seconds):
    assert retry_after_seconds(headers) == seconds


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, {"error": {"message": "Your credit balance is too low"}}, "quota"),
        (429, {"error": {"message": "m", "type": "insufficient_quota"}}, "quota"),
        (429, {"error": {"message": "tokens per minute"}}, "rate_limited"),
        (400, {"error": {"message": "filtered", "code": "content_filter"}}, "refusal"),
        (400, {"error": "text"}, "rejected"),
        (422, "plain", "rejected"),
        (413, None, "rejected"),
        (500, "<html><h1>Oops</h1></html>", "server_error"),
    ],
)
def test_a_status_is_sorted_by_what_is_to_be_done(status, body, kind):
    error = status_error(status, body, {})
    assert error.kind == kind and str(status) in error.message and "<" not in error.message


def test_a_key_that_echoes_is_the_servers_to_check():
    with LlmServer(require_key=True) as server:
        settings = server.settings("openai").with_keys({})
        with LlmClient(settings) as client:
            client.preflight()
        other = LlmSettings(**settings.model_dump()).with_keys({"openai": type(settings.api_key())("sk-wrong-key-1")})
        with LlmClient(other) as client, pytest.raises(UserError, match=r"refuses the key.*OPENAI_API_KEY") as raised:
            client.preflight()
    assert "sk-wrong-key-1" not in str(raised.value)


def test_an_unknown_model_is_said_with_the_remedy():
    with LlmServer() as server:
        server.models = {"qwen3:30b"}
        client = LlmClient(server.settings("ollama", model="qwen9:1b"))
        with client, pytest.raises(UserError, match=r"does not know the model 'qwen9:1b'.*ollama pull qwen9:1b"):
            client.preflight()


# --- A local model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A causal model of random weights that knows thirty words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    text = 'schema : merge { } " , reasoning decision same different is the a pair one'
    words = ["<unk>", "<eos>", *text.split(" ")]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tiny-lm")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_local_model_generates_in_this_process(tiny_model):
    settings = LlmSettings(provider="transformers", model=str(tiny_model), max_answer_tokens=16)
    wire = get_llm_provider(settings=settings)
    reply = wire.send(call_of(max_tokens=16), wire.capabilities)
    assert reply.tokens_in > 5 and 0 < reply.tokens_out <= 16
    assert wire.send(call_of(max_tokens=16), wire.capabilities) == reply
    warm = call_of(temperature=1.5, max_tokens=16)
    assert wire.send(warm, wire.capabilities) == wire.send(warm, wire.capabilities)  # by llm.seed
    with LlmClient(settings) as client:
        answer = client.answer(LlmRequest(MESSAGES, MergeAnswer, "merge", step="merge"))
        assert answer.failure is not None and client.ledger.summary()["failures"]["quarantined"] == 1


def test_a_tokenizer_without_a_vocabulary_is_an_error_of_the_user(tiny_model, tmp_path):
    folder = tmp_path / "no-words"
    shutil.copytree(tiny_model, folder)
    (folder / "tokenizer.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "BertTokenizer"}))
    wire = get_llm_provider(settings=LlmSettings(provider="transformers", model=str(folder)))
    with pytest.raises(UserError, match="its tokenizer has no vocabulary; save the tokenizer"):
        wire.chat_completion(MESSAGES)


def test_a_folder_without_a_model_is_an_error_of_the_user(tmp_path):
    wire = get_llm_provider(settings=LlmSettings(provider="transformers", model=str(tmp_path)))
    with pytest.raises(UserError, match=str(tmp_path.name)):
        wire.chat_completion(MESSAGES)


def test_a_prompt_for_a_model_without_a_chat_template():
    assert render_prompt(MESSAGES, template="plain") == "System:\nCompare.\n\nUser:\none pair\n\nAssistant:\n"

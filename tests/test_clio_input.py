"""Mode clio before anything is asked: masks, dialogues of all shapes, keys, and the sample of the demonstration."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from common.config import ConfigError, UserError, load_settings
from demo.dialogues import generate_dialogues, main, to_json_lines
from llm_cluster import LlmClusterSettings
from llm_parts.clio.conversations import Turn, cut_middle, load_conversations, read_conversations
from llm_parts.clio.masking import Masker, is_iban, passes_luhn
from llm_parts.clio.settings import ClioSettings, Extractor, Facet, ModelChoice
from llm_parts.settings import LlmSettings

ROOT = Path(__file__).resolve().parents[1]


# --- masks -----------------------------------------------------------------------------------------------------------


def test_check_digits_by_hand():
    # 79927398713: doubled from the right 1, 2, 9, 6, 9, 5, 7, 4, 9, 9, 7 (digits of products added): 70.
    assert passes_luhn("79927398713") and not passes_luhn("79927398710")
    assert not passes_luhn("0000000000000000")
    # GB82 WEST 1234 5698 7654 32: 3214282912345698765432161182 leaves 1 modulo 97.
    assert 3214282912345698765432161182 % 97 == 1
    assert is_iban("GB82WEST12345698765432") and not is_iban("GB82WEST12345698765433")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to john.doe+x@mail.example.co.uk!", "write to [mail]!"),
        ("почта: иван@пример.рф", "почта: [mail]"),
        ("card 4111 1111 1111 1111, exp 12/27", "card [card], exp 12/27"),
        ("card 4111-1111-1111-1111 12/27", "card [card] 12/27"),
        ("order 12 4111111111111111", "order 12 [card]"),
        ("card 3782 822463 10005.", "card [card]."),
        ("41111111\u200b11111111", "[card]"),
        ("DE89 3704 0044 0532 0130 00 please", "[iban] please"),
        ("iban de89370400440532013000", "iban [iban]"),
        ("call +7 (912) 345-67-89 or 555-0134", "call [phone] or [phone]"),
        ("8 912 345 67 89", "[phone]"),
        ("Anna Lee, ANNA and Annabel", "[name], [name] and Annabel"),
        ("иван и Ивана", "[name] и Ивана"),
    ],
)
def test_what_points_to_a_person_is_masked(text, masked):
    assert Masker(names=["Anna", "Anna Lee", "Иван", " "]).mask(text) == masked


@pytest.mark.parametrize(
    "text",
    [
        "on 2024-11-21 at 10:42 and 21.11.2024",
        "4111111111111112",  # not a card, and too long for a phone
        "I paid 12 500 EUR for order 12345",
        "version 3.11.4, 20241121",
        "AB12 is a gate, DE12 3456 is no account",
    ],
)
def test_other_numbers_stay(text):
    assert Masker().mask(text) == text


def test_masks_are_counted_and_can_be_off():
    masker = Masker(names=["Anna"])
    masker.mask("Anna: a@b.cc, a@b.cc, +49 30 1234567")
    assert masker.counts == {"mail": 2, "phone": 1, "name": 1}
    assert Masker(enabled=False, names=["Anna"]).mask("Anna a@b.cc") == "Anna a@b.cc"


# --- dialogues -------------------------------------------------------------------------------------------------------


def read(*cells, max_chars=1000, **columns):
    masker = Masker()
    return read_conversations(
        [{"messages": list(cells), **columns}], source="messages", max_chars=max_chars, masker=masker
    )


def turns(table, row=0):
    return [(turn.role, turn.content) for turn in table.conversations[row].turns]


def test_messages_of_all_shapes():
    said = [{"role": "user", "content": "hello"}, {"role": "Assistant", "content": "hi"}]
    expected = [("user", "hello"), ("assistant", "hi")]
    assert turns(read(said)) == turns(read(json.dumps(said))) == turns(read({"messages": said})) == expected
    assert turns(read("just a text")) == [("user", "just a text")]
    assert turns(read("[1] is a footnote")) == [("user", "[1] is a footnote")]
    parts = [{"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "image"}, "here"]}]
    assert turns(read(parts)) == [("user", "look\nhere")]
    assert turns(read(["no role", {"role": "wizard", "content": "abra"}])) == [("other", "no role"), ("other", "abra")]


def test_odd_dialogues_stay_and_are_counted():
    cells = [None, [], [{"role": "user", "content": " "}], [{"content": "x"}], [{"role": "user", "content": "one"}]]
    table = read(*cells, conversation_id=["a", "a", None, "b", 7], user_id=[None, "u", None, None, None])
    assert [one.conversation_id for one in table.conversations] == ["a", "a", "conv-2", "b", "7"]
    assert [one.is_empty for one in table.conversations] == [True, True, True, False, False]
    assert table.counts() == {
        "conversations": 5, "empty": 3, "one_message": 2, "repeated_ids": 1, "unknown_roles": 1,
    }  # fmt: skip
    assert table.has_users and table.labels() is None


def test_a_long_dialogue_keeps_its_ends():
    said = [Turn("user", "a" * 30), Turn("assistant", "b" * 50), Turn("user", "c" * 20)]
    assert cut_middle(said, max_chars=100) == (said, 0)
    kept, n_left_out = cut_middle(said, max_chars=60)
    assert n_left_out == 40
    assert [(turn.role, len(turn.content)) for turn in kept if turn.role != "note"] == [
        ("user", 30), ("assistant", 10), ("user", 20),
    ]  # fmt: skip
    assert kept[1] == Turn("note", "[40 characters left out here]")
    within, n_left_out = cut_middle([Turn("user", "x" * 40 + "y" * 40)], max_chars=20)
    assert [turn.content for turn in within] == ["x" * 10, "[60 characters left out here]", "y" * 10]


def test_a_number_on_the_cut_is_masked_before_it_is_cut():
    text = "a" * 490 + " 4111 1111 1111 1111 " + "b" * 900
    table = read([{"role": "user", "content": text}])
    assert table.odd["cut"] == 1 and table.masked == {"card": 1}
    assert not re.search(r"\d{4}", turns(table)[0][1])


def test_files_with_messages_or_texts_and_the_wrong_ones(tmp_path):
    path = tmp_path / "dialogues.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}], "topic": "x"}\n{"messages": null}\n')
    table = load_conversations(ClioSettings(input=str(path), label_column="topic"))
    assert (len(table), table.labels()) == (2, ["x", ""])
    table = load_conversations(ClioSettings(input=str(path), limit=1))
    assert len(table) == 1
    csv = tmp_path / "texts.csv"
    csv.write_text("conversation_id,text\nc1,how to cook\n")
    assert turns(load_conversations(ClioSettings(input=str(csv)))) == [("user", "how to cook")]
    with pytest.raises(UserError, match=r"neither a column 'turns' nor 'body'.*set clio.messages_column"):
        load_conversations(ClioSettings(input=str(csv), messages_column="turns", text_column="body"))
    with pytest.raises(UserError, match=r"no column 'topic'.*set clio.label_column"):
        load_conversations(ClioSettings(input=str(csv), label_column="topic"))
    with pytest.raises(ConfigError, match="clio.input: required"):
        load_conversations(ClioSettings())


# --- keys ------------------------------------------------------------------------------------------------------------


def test_the_example_shows_every_key_with_its_default():
    shown = yaml.safe_load((ROOT / "clustering.example.yaml").read_text(encoding="utf-8"))["clio"]
    default = ClioSettings().model_dump(mode="json")
    assert set(shown) == set(default)
    for name, value in shown.items():
        if isinstance(value, dict):
            assert set(value) == set(default[name]), name
    assert ClioSettings(**shown).model_dump(mode="json") == default | {"input": "runs/demo/dialogues.jsonl"}


def test_every_key_is_documented_and_every_documented_key_exists():
    page = (ROOT / "docs" / "clio.md").read_text(encoding="utf-8").split("## Keys of `clio`")[1]
    first_cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", page, re.MULTILINE)
    documented = [key for cell in first_cells for key in re.findall(r"`(\w+)`", cell)]
    assert sorted(documented) == sorted(ClioSettings.model_fields)
    below = page.split("\nA facet has")[1]
    for name in ("embedding", "clustering", "self_training", "patchscope"):
        keys = set(type(ClioSettings.model_fields[name].default).model_fields)
        part = below.split(f"\n- `{name}`:")[1].split("\n- ")[0]
        assert keys <= set(re.findall(r"`(\w+)`", part)), name
    assert set(Facet.model_fields) <= set(re.findall(r"`(\w+)`", below))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_cluster": 5}, "clio.n_cluster: no such key; did you mean 'n_clusters'"),
        ({"facets": [{"name": "a", "question": "?", "type": "choice"}]}, "two different choices"),
        ({"facets": [{"name": "a", "question": "?", "type": "number"}]}, "must be of type text"),
        ({"facets": [{"name": "a", "question": "?"}, {"name": "a", "question": "!"}]}, "'a' stands twice"),
        ({"facets": []}, "clio.facets"),
        ({"judges": [{}, {}]}, "the same judge stands twice"),
        ({"naming": "best"}, "clio.naming"),
        ({"min_cluster_size": 0}, "clio.min_cluster_size"),
        ({"mask": 1.5}, "clio.mask"),
    ],
)
def test_wrong_keys_are_named(tmp_path, values, message):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"llm_cluster": {"mode": "clio"}, "clio": values}))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_settings(config, LlmClusterSettings, section="llm_cluster")


def test_another_model_takes_from_llm_what_it_does_not_say():
    llm = LlmSettings(provider="openai", model="large", url="http://a/v1", concurrency=3)
    assert ModelChoice().llm_settings(llm) == llm
    smaller = ModelChoice(model="small", temperature=0.5).llm_settings(llm)
    assert (smaller.model, smaller.url, smaller.temperature, smaller.concurrency) == ("small", "http://a/v1", 0.5, 3)
    other = Extractor(provider="anthropic", facet_prompt="detailed").llm_settings(llm)
    assert (other.provider, other.model, other.url) == ("anthropic", None, None)
    assert ModelChoice(model="small", temperature=0.5).label(llm) == "openai small at 0.5"
    limited = LlmSettings(provider="openai", model="large", max_cost=1.0, prices={"large": {"input": 1, "output": 1}})
    with pytest.raises(ConfigError, match=r"(?s)further model small.*price of 'small' is not known"):
        ModelChoice(model="small").llm_settings(limited)


# --- the demonstration -----------------------------------------------------------------------------------------------


def test_demonstration_is_odd_where_it_should_be_and_the_same_again(tmp_path, capsys):
    rows = generate_dialogues(200, seed=3)
    assert to_json_lines(rows) == to_json_lines(generate_dialogues(200, seed=3))
    assert sum(not row["messages"] for row in rows) == 1
    assert len({row["true_intent"] for row in rows}) > 20
    table = read(*(row["messages"] for row in rows), max_chars=8000)
    assert table.odd["cut"] == table.odd["unknown_roles"] == table.odd["empty"] == 1
    assert set(table.masked) == {"card", "iban", "mail", "phone"}
    path = tmp_path / "d.jsonl"
    assert main(["--out", str(path), "--rows", "5"]) == 0 == main(["--out", str(path), "--rows", "5"])
    assert main(["--out", str(path), "--rows", "6"]) == 1 == main(["--out", str(path), "--rows", "0"])
    assert "--overwrite" in capsys.readouterr().err

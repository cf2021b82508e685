"""The demonstration dataset: its columns, its shares, its odd texts, and equal bytes for equal seeds."""

import random
import re
from collections import Counter

import pyarrow.parquet as pq
import pytest

from common.config import UserError
from demo import english, russian
from demo.intents import CONFUSABLE_PAIRS, INTENTS, neighbours_of
from demo.noise import misspell, strip_punctuation
from demo.support_requests import generate_requests, main, to_parquet
from demo.writer import MessageWriter

NAMES = {intent.name for intent in INTENTS}


@pytest.fixture(scope="module")
def requests():
    return generate_requests(3000, seed=7).to_pylist()


def test_thirty_intents_each_with_wording_in_both_languages():
    assert len(NAMES) == len(INTENTS) == 30
    assert set(english.SENTENCES) == set(russian.SENTENCES) == NAMES
    assert {name for pair in CONFUSABLE_PAIRS for name in pair} <= NAMES
    assert neighbours_of("card_lost") == ("card_stolen",)


@pytest.mark.parametrize("language", ["en", "ru"])
def test_every_template_can_be_written_out(language):
    words = {"en": english, "ru": russian}[language]
    groups = [words.GREETINGS, words.CLOSINGS, words.REQUESTS, *words.CONTEXTS.values(), *words.VAGUE.values()]
    for template in [template for group in [*groups, *words.SENTENCES.values()] for template in group]:
        assert template.count("[") == template.count("]") and template.count("{") == template.count("}"), template
        for seed in range(12):
            text = MessageWriter(language, random.Random(seed))._fill([template])
            assert text and not re.search(r"[\[\]{}|]|  | [,.?]", text), (template, text)


def test_shares_of_languages_labels_and_right_teachers(requests):
    readable = [row for row in requests if (row["text"] or "").strip()]
    labelled = [row for row in requests if row["label"] is not None]
    assert {row["true_intent"] for row in requests} == NAMES
    assert 0.66 < sum(row["language"] == "en" for row in requests) / len(requests) < 0.74
    assert 0.09 < len(labelled) / len(readable) < 0.11
    assert all(row["label"] == row["true_intent"] for row in labelled)
    assert {row["label"] for row in labelled} == NAMES
    assert all(row["teacher_label"] in NAMES for row in requests)
    assert 0.82 < sum(row["teacher_label"] == row["true_intent"] for row in requests) / len(requests) < 0.88


def test_teacher_errs_most_often_towards_a_confusable_intent(requests):
    wrong = [row for row in requests if row["teacher_label"] != row["true_intent"]]
    near = [row for row in wrong if row["teacher_label"] in neighbours_of(row["true_intent"])]
    assert 0.6 < len(near) / len(wrong) < 0.9


def test_odd_texts_are_there_and_unlabelled_where_unreadable(requests):
    texts = [row["text"] for row in requests]
    assert texts.count(None) == 3 and texts.count("") == 3
    assert sum(text is not None and text != "" and not text.strip() for text in texts) == 3
    assert sum(len(text or "") == 100_000 for text in texts) == 3
    assert any("<script>" in (text or "") for text in texts) and any("\x00" in (text or "") for text in texts)
    assert all(row["label"] is None for row in requests if not (row["text"] or "").strip())
    assert Counter(text for text in texts if text and text.strip()).most_common(1)[0][1] >= 2


def test_requests_of_one_intent_are_worded_differently(requests):
    texts = [row["text"].lower() for row in requests if row["true_intent"] == "card_lost" and row["text"]]
    assert len(set(texts)) / len(texts) > 0.8


def test_ids_are_unique_and_times_ascend(requests):
    assert len({row["request_id"] for row in requests}) == len(requests)
    times = [row["created_at"] for row in requests]
    assert times == sorted(times) and times[0].year == 2026


def test_equal_seeds_give_equal_bytes_and_another_seed_does_not():
    first = to_parquet(generate_requests(300, seed=3))
    assert first == to_parquet(generate_requests(300, seed=3))
    assert first != to_parquet(generate_requests(300, seed=4))


def test_command_writes_once_leaves_an_equal_file_and_refuses_another(tmp_path, capsys):
    path = tmp_path / "deep" / "requests.parquet"
    command = ["--out", str(path), "--rows", "200", "--seed", "1"]
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert pq.read_metadata(path).num_rows == 200
    before = path.stat().st_mtime_ns
    assert main(command) == 0 and path.stat().st_mtime_ns == before
    assert "already there" in capsys.readouterr().err
    assert main([*command[:-1], "2"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command[:-1], "2", "--overwrite"]) == 0
    assert [entry.name for entry in path.parent.iterdir()] == ["requests.parquet"]


def test_one_row_works_and_none_is_refused():
    assert generate_requests(1).num_rows == 1
    with pytest.raises(UserError, match="--rows is 0"):
        generate_requests(0)


def test_misspelling_changes_letters_only_and_speech_has_no_punctuation():
    dice = random.Random(0)
    assert misspell("12 34", n_errors=3, dice=dice) == "12 34"
    changed = [misspell("transfer", n_errors=1, dice=dice) for _ in range(50)]
    assert sum(word != "transfer" for word in changed) > 40 and all(word[0] == "t" for word in changed)
    assert strip_punctuation("Hi,\nmy card: lost!") == "Hi my card lost"

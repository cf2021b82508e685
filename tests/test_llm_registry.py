"""The registry: ids of any script, merges, counts by batch, and a file that survives being cut."""

from __future__ import annotations

import json
import logging

import pytest

from common.config import UserError
from llm_parts.registry import ClusterRecord, ClusterRegistry, clean_line, make_cluster_id, normal_name
from llm_parts.registry_file import RegistryFile, render_registry


def make_registry(*names: str) -> ClusterRegistry:
    registry = ClusterRegistry()
    for name in names:
        registry.add(name)
    return registry


# --- ids and names ---------------------------------------------------------------------------------------------------


def test_names_of_any_script_have_ids_of_their_own():
    names = [
        "Не могу войти",
        "Не могу выйти",
        "カードが届かない",
        "بطاقتي لم تصل",
        "💳",
        "💸",
        "a b",
        "ab",
        "Can't log in",
    ]
    ids = [make_cluster_id(name) for name in names]
    assert len(set(ids)) == len(names)
    assert all(cluster_id and not any(c.isspace() for c in cluster_id) for cluster_id in ids)


def test_ids_depend_on_nothing_but_the_name():
    assert make_cluster_id("Card not arrived") == "card_not_arrived_1a78cb"
    assert make_cluster_id("  card   NOT arrived ") == make_cluster_id("Card not arrived")
    assert make_cluster_id("Card not arrived", taken=["card_not_arrived_1a78cb"]) == "card_not_arrived_1a78cb_2"


def test_composed_and_decomposed_letters_are_one_name():
    assert normal_name("Cafe\u0301") == normal_name("Caf\u00e9")
    assert make_cluster_id("Cafe\u0301") == make_cluster_id("Caf\u00e9")


def test_an_id_survives_a_new_name():
    registry = make_registry("Login problem")
    cluster_id = registry.live()[0].cluster_id
    renamed = registry.rename(cluster_id, "Cannot sign in")
    assert (renamed.cluster_id, renamed.name, renamed.aliases) == (cluster_id, "Cannot sign in", ["Login problem"])
    assert renamed.revision == 2


def test_no_two_live_clusters_bear_one_name():
    registry = make_registry("Refund", "refund", "REFUND ")
    assert [record.name for record in registry.live()] == ["Refund", "refund (2)", "REFUND (3)"]
    assert len({record.cluster_id for record in registry.live()}) == 3


def test_names_lose_control_and_direction_characters():
    assert clean_line("  Pay\x00ment\u202e \n late ", max_chars=50) == "Pay ment late"
    assert clean_line("x" * 200, max_chars=120) == "x" * 119 + "…"
    with pytest.raises(UserError, match="needs a name"):
        make_registry("\u202e\n")


# --- counts and merges -----------------------------------------------------------------------------------------------


def test_a_cluster_is_tentative_below_three_requests():
    registry = make_registry("Refund")
    cluster_id = registry.live()[0].cluster_id
    assert registry.add_requests(cluster_id, n=2, samples=["a", "a"], batch_id="b1").status == "tentative"
    record = registry.add_requests(cluster_id, n=1, samples=["b"], batch_id="b1")
    assert (record.status, record.count, record.sample_requests) == ("active", 3, ["a", "b"])


def test_the_same_batch_again_is_not_counted_twice():
    registry = make_registry("Refund")
    cluster_id = registry.live()[0].cluster_id
    registry.add_requests(cluster_id, n=5, samples=[], batch_id="b1")
    registry.add_requests(cluster_id, n=7, samples=[], batch_id="b2")
    registry.note_batch("b1", n_requests=5, n_assigned=5)
    registry.begin_batch("b1")
    assert registry.get(cluster_id).count == 7
    assert registry.batches == []
    registry.add_requests(cluster_id, n=4, samples=[], batch_id="b1")
    assert registry.get(cluster_id).count == 11


def test_merging_adds_up_keeps_names_and_stays_readable():
    registry = make_registry("Login", "Sign in", "Third")
    first, second, third = (record.cluster_id for record in registry.live())
    registry.add_requests(first, n=4, samples=["x"], batch_id="b1")
    registry.add_requests(second, n=3, samples=["y"], batch_id="b1")
    registry.add_alias(second, "Log on")
    merged = registry.merge(second, first)
    assert (merged.count, merged.aliases, merged.counts_by_batch) == (7, ["Sign in", "Log on"], {"b1": 7})
    assert merged.sample_requests == ["x", "y"]
    assert registry.get(second).status == "merged"
    assert [record.cluster_id for record in registry.live()] == [first, third]
    registry.merge(first, third)
    assert registry.resolve(second) == third  # through two merges
    assert registry.resolve("nobody") is None
    assert registry.resolve(None) is None
    with pytest.raises(ValueError, match="cannot merge"):
        registry.merge(second, third)


def test_batches_are_numbered_past_the_known_ones():
    registry = ClusterRegistry()
    assert registry.next_batch_id() == "batch-001"
    registry.note_batch("batch-001", n_requests=1, n_assigned=1)
    registry.note_batch("monday", n_requests=1, n_assigned=1)
    assert registry.next_batch_id() == "batch-003"


def test_a_cluster_with_requests_cannot_be_forgotten():
    registry = make_registry("Refund")
    cluster_id = registry.live()[0].cluster_id
    registry.add_requests(cluster_id, n=1, samples=[], batch_id="b")
    with pytest.raises(ValueError, match="can only be merged"):
        registry.remove(cluster_id)


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_generations(tmp_path):
    path = tmp_path / "clusters.json"
    file = RegistryFile(path)
    file.save(make_registry("Old"))
    file.save(make_registry("Old", "Новый"))
    return path


def test_a_registry_comes_back_equal(two_generations):
    registry = RegistryFile(two_generations).load()
    assert [record.name for record in registry.live()] == ["Old", "Новый"]
    assert "Новый" in two_generations.read_text(encoding="utf-8")  # readable, not escaped
    assert render_registry(registry) == two_generations.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_file_cut_anywhere_falls_back_loudly(two_generations, share, caplog):
    content = two_generations.read_bytes()
    two_generations.write_bytes(content[: int(share * len(content))])
    file = RegistryFile(two_generations)
    with caplog.at_level(logging.WARNING):
        registry = file.load()
    assert [record.name for record in registry.live()] == ["Old"]
    assert "DAMAGED" in caplog.text and "DAMAGED" in file.warning
    registry.add("Next")
    file.save(registry)  # the damaged file must not become the previous generation
    assert [r.name for r in RegistryFile(two_generations).load().live()] == ["Old", "Next"]
    assert [r["name"] for r in json.loads(file.previous_path.read_text())["clusters"]] == ["Old"]


def test_two_damaged_generations_are_an_error(two_generations):
    two_generations.write_text("{")
    RegistryFile(two_generations).previous_path.write_text("[]")
    with pytest.raises(UserError, match=r"damaged .* and so is .*previous"):
        RegistryFile(two_generations).load()


def test_another_format_is_refused_even_with_a_previous_generation(two_generations):
    values = json.loads(two_generations.read_text())
    two_generations.write_text(json.dumps({**values, "format": 2}))
    with pytest.raises(UserError, match="has format 2, this version reads format 1"):
        RegistryFile(two_generations).load()


def test_what_is_no_registry_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"name": "a package"}')
    with pytest.raises(UserError, match="no field `format`"):
        RegistryFile(path).load()


def test_a_registry_edited_by_hand_is_checked(tmp_path):
    path = tmp_path / "clusters.json"
    record = ClusterRecord(cluster_id="a", name="A").model_dump()
    path.write_text(json.dumps({"format": 1, "clusters": [record, record]}))
    with pytest.raises(UserError, match="two clusters have one id"):
        RegistryFile(path).load()
    path.write_text(json.dumps({"format": 1, "clusters": [{"cluster_id": "a", "name": "A"}]}))
    assert RegistryFile(path).load().get("a").name == "A"

"""What a search proposes is a pure function of its seed and of what it was told, wherever it was interrupted."""

from __future__ import annotations

from collections import Counter

import pytest

from image_parts.settings import ImageSettings
from image_parts.tuning.incumbents import Scored, cross_stages, step_from_best
from image_parts.tuning.journal import journal_study, open_journal
from image_parts.tuning.samplers import move_to_unknown
from image_parts.tuning.search import Outcome, Search
from image_parts.tuning.space import choice_key, read_space

VALUES = {
    "clustering.min_cluster_size": [5, 10, 20, 40, 80],
    "clustering.min_samples": [1, 2, 3, 4, 5],
    "reduction.umap_min_dist": [0.0, 0.1, 0.3],
    "clustering.cluster_selection_method": ["leaf", "eom"],
}
TARGET = {"clustering.min_cluster_size": 20, "clustering.min_samples": 4, "reduction.umap_min_dist": 0.0,
          "clustering.cluster_selection_method": "eom"}  # fmt: skip


def space_of(strategy: str):
    tuning = {"search_strategy": strategy, "search_space": VALUES, "population_size": 6}
    return read_space(ImageSettings.model_validate({"tuning": tuning}))


def steps_to_target(choice, space) -> float:
    return -float(sum(abs(p.values.index(choice[p.name]) - p.values.index(TARGET[p.name])) for p in space.parameters))


def drive(search: Search, space, *, n_batches: int, cut: int | None = None) -> list[str]:
    """Propose and tell; with `cut`, stop while the last batch is half told, as a kill would."""
    told = [choice_key(proposal.choice) for proposal, _ in search.outcomes]
    seen = set(told)
    for batch in range(len(told) // search.batch_size, n_batches):
        proposals = search.propose()
        outcomes = []
        for proposal in proposals:
            key = choice_key(proposal.choice)
            score = steps_to_target(proposal.choice, space)
            outcomes.append(Outcome(score, proposal.number + 1, key not in seen))
            seen.add(key)
        if cut is not None and batch == n_batches - 1:
            proposals, outcomes = proposals[:cut], outcomes[:cut]
        search.tell(proposals, outcomes)
        told += [choice_key(proposal.choice) for proposal in proposals]
    return told


def make_search(space, path, **options) -> Search:
    options = {"n_evaluations": space.base.tuning.max_evaluations} | options
    return Search(space, space.base.tuning, name="phase 2", journal_path=path, **options)


@pytest.mark.parametrize("strategy", ["evolution", "tpe", "grid"])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path, strategy):
    space = space_of(strategy)
    n_batches = 2 if strategy == "grid" else 6
    whole = drive(make_search(space, tmp_path / "whole"), space, n_batches=n_batches)
    for n_before, cut in [(1, 2), (n_batches - 1, 0), (n_batches, 3)]:
        path = tmp_path / f"cut-{n_before}-{cut}"
        drive(make_search(space, path), space, n_batches=n_before, cut=cut)
        with path.open("ab") as journal:
            journal.write(b'{"op_code":4,"worker_id":"tor')  # a line that a kill tore
        assert drive(make_search(space, path), space, n_batches=n_batches) == whole


@pytest.mark.parametrize("strategy", ["evolution", "tpe"])
def test_a_search_beats_chance(tmp_path, strategy):
    """60 of 150 points: chance finds the best one in two of five searches, a search that learns in nearly all."""
    space = space_of(strategy)
    n_batches = 60 // make_search(space, tmp_path / "size").batch_size
    told = drive(make_search(space, tmp_path / "journal"), space, n_batches=n_batches)
    assert choice_key(TARGET) in told
    assert len(set(told)) == len(told)  # and it goes on to new ones


def test_a_known_choice_is_moved_to_the_nearest_unknown_one():
    space = space_of("tpe")
    known = {choice_key(TARGET)}

    def move(seed: int = 1):
        return move_to_unknown(TARGET, space, is_known=known.__contains__, seed=seed)

    near = {choice_key(choice) for choice in space.neighbors(TARGET)}
    assert len(near) == 6  # two sizes, two counts of samples, one distance, one method
    while near - known:
        assert steps_to_target(move(), space) == -1 and choice_key(move()) not in known
        assert move() == move()
        known.add(choice_key(move()))
    assert steps_to_target(move(), space) == -2
    known.discard(choice_key(TARGET))
    assert move() == TARGET
    assert move_to_unknown(TARGET, space, is_known=lambda key: True, seed=1) == TARGET


def test_what_does_not_fit_together_is_passed_over():
    tuning = {"search_space": {"clustering.min_cluster_size": [5, 10], "clustering.min_samples": [3, 8]}}
    space = read_space(ImageSettings.model_validate({"tuning": {**tuning, "search_strategy": "tpe"}}))
    small = {"clustering.min_cluster_size": 5, "clustering.min_samples": 3}
    known = {choice_key(small)}
    moved = {choice_key(move_to_unknown(small, space, is_known=known.__contains__, seed=i)) for i in range(20)}
    assert moved == {choice_key({**small, "clustering.min_cluster_size": 10})}  # never 5 with 8


def exhaust(derive, scored, space) -> list[str]:
    """What a derivation proposes until it has nothing left."""
    known, found = {choice_key(entry.choice) for entry in scored}, []
    while (choice := derive(scored, space, is_known=known.__contains__, seed=3)) is not None:
        assert choice_key(choice) not in known
        known.add(choice_key(choice))
        found.append(choice_key(choice))
    return found


def first_of(derive, scored, space, *, seed: int) -> str:
    known = {choice_key(entry.choice) for entry in scored}
    return choice_key(derive(scored, space, is_known=known.__contains__, seed=seed))


def test_good_cuts_are_tried_on_the_embeddings_of_others_the_better_the_sooner():
    space = space_of("tpe")
    twin = {**TARGET, "clustering.min_samples": 3}  # the same clusters as TARGET
    other = {**TARGET, "reduction.umap_min_dist": 0.3, "clustering.min_samples": 1}
    scored = [Scored(other, 0.1, "a"), Scored(twin, 0.9, "b"), Scored(TARGET, 0.9, "b")]
    best, next_best = ({**cut, "reduction.umap_min_dist": 0.3} for cut in (twin, TARGET))
    worst = {**other, "reduction.umap_min_dist": 0.0}
    assert sorted(exhaust(cross_stages, scored, space)) == sorted(map(choice_key, (best, next_best, worst)))
    firsts = Counter(first_of(cross_stages, scored, space, seed=seed) for seed in range(300))
    # By weights of 1, 0.7 and 0.49.
    assert [firsts[choice_key(choice)] / 300 for choice in (best, next_best, worst)] == pytest.approx(
        [0.457, 0.320, 0.224], abs=0.08
    )


def test_steps_are_taken_from_all_good_ones_and_most_from_the_best():
    space = space_of("tpe")
    other = {**TARGET, "clustering.min_cluster_size": 80, "reduction.umap_min_dist": 0.3}
    scored = [Scored(other, 0.1, "a"), Scored(TARGET, 0.9, "b")]
    near = [{choice_key(choice) for choice in space.neighbors(start)} for start in (TARGET, other)]
    assert near[0].isdisjoint(near[1])
    assert sorted(exhaust(step_from_best, scored, space)) == sorted(near[0] | near[1])
    n_from_best = sum(first_of(step_from_best, scored, space, seed=seed) in near[0] for seed in range(300))
    assert n_from_best / 300 == pytest.approx(1 / 1.7, abs=0.08)


@pytest.mark.parametrize("strategy", ["evolution", "tpe"])
def test_only_the_first_of_equal_clusters_is_told(tmp_path, strategy):
    """All candidates give one of two clusterings: a sampler hears of two, before and after an interruption."""
    space, path = space_of(strategy), tmp_path / "journal"
    for _ in range(2):
        search = make_search(space, path)
        proposals = search.propose()
        search.tell(
            proposals, [Outcome(p.number % 2, p.number + 1, True, labels="ab"[p.number % 2]) for p in proposals]
        )
    trials = journal_study(open_journal(path), "phase 2").get_trials(deepcopy=False)
    assert [trial.number for trial in trials if trial.state.name == "COMPLETE"] == [0, 1]
    assert len(trials) == 2 * search.batch_size


def test_a_grid_meets_every_point_once_and_ends(tmp_path):
    space = space_of("grid")
    search = make_search(space, tmp_path / "journal")
    told = drive(search, space, n_batches=3)
    assert len(told) == len(set(told)) == space.n_points == 150
    assert search.propose() == []


def test_forced_choices_come_first_and_a_grid_takes_only_them(tmp_path):
    space = space_of("evolution")
    forced = [TARGET, *space.neighbors(TARGET)]
    search = make_search(space, tmp_path / "journal", forced=forced)
    told = drive(search, space, n_batches=2)
    assert told[: len(forced)] == [choice_key(choice) for choice in forced]
    only = make_search(space_of("grid"), tmp_path / "only", forced=forced, only_forced=True)
    assert drive(only, space, n_batches=1) == told[: len(forced)] and only.propose() == []


@pytest.mark.parametrize("strategy", ["evolution", "tpe"])
def test_a_third_of_the_evaluations_looks_around_whatever_was_found_before(tmp_path, strategy):
    space = space_of(strategy)

    def proposals(name: str, *, sign: float) -> list[str]:
        search, told = make_search(space, tmp_path / name, n_evaluations=60), []
        while len(told) < 40:
            batch = search.propose()
            scores = [sign * steps_to_target(proposal.choice, space) for proposal in batch]
            outcomes = [
                Outcome(score, proposal.number + 1, True) for score, proposal in zip(scores, batch, strict=True)
            ]
            search.tell(batch, outcomes)
            told += [choice_key(proposal.choice) for proposal in batch]
        return told

    towards, away = proposals("towards", sign=1.0), proposals("away", sign=-1.0)
    assert towards[:20] == away[:20]
    assert towards[20:40] != away[20:40]

"""The batches of an epoch: pairs guaranteed, quotas kept, no text repeated, nothing but (seed, epoch) counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metric_parts.sampler import SamplerRows, SamplerSettings, plan_epoch


def make_rows(codes, *, metric=None, classifier=None, texts=None):
    n = len(codes)
    return SamplerRows(
        np.asarray(codes, np.int64),
        np.ones(n, bool) if metric is None else np.asarray(metric, bool),
        np.ones(n, bool) if classifier is None else np.asarray(classifier, bool),
        np.arange(n) if texts is None else np.asarray(texts, np.int64),
    )


def plan(rows, *, batch_size=16, samples_per_class=2, seed=0, epoch=0, **options):
    return plan_epoch(rows, settings=SamplerSettings(batch_size, samples_per_class, **options), seed=seed, epoch=epoch)


def check_batches(rows, batches, *, batch_size):
    """What every plan promises."""
    for batch in batches:
        assert 0 < len(batch) <= batch_size
        assert len(np.unique(batch)) == len(batch)
        assert len(np.unique(rows.text_keys[batch])) == len(batch)
        metric = batch[rows.metric_mask[batch]]
        codes, counts = np.unique(rows.codes[metric], return_counts=True)
        for code, count in zip(codes, counts, strict=True):
            has_pair = len(np.unique(rows.text_keys[rows.metric_mask & (rows.codes == code)])) > 1
            assert count > 1 or not has_pair


def test_every_row_comes_once_and_every_anchor_has_a_positive():
    rows = make_rows(np.arange(200) % 23)
    made = plan(rows)
    check_batches(rows, made.batches, batch_size=16)
    assert np.array_equal(np.sort(np.concatenate(made.batches)), np.arange(200))
    assert min(len(batch) for batch in made.batches) >= 12


def test_a_batch_holds_many_classes():
    rows = make_rows(np.repeat(np.arange(30), 10))
    assert min(len(np.unique(rows.codes[batch])) for batch in plan(rows).batches) >= 6


def test_classifier_only_rows_have_their_share_in_each_batch():
    metric = np.arange(300) % 4 != 0  # a quarter is for the classifier alone
    rows = make_rows(np.arange(300) % 10, metric=metric)
    made = plan(rows, batch_size=20)
    check_batches(rows, made.batches, batch_size=20)
    shares = [np.mean(~metric[batch]) for batch in made.batches]
    assert min(shares) >= 0.15 and max(shares) <= 0.35
    assert np.array_equal(np.sort(np.concatenate(made.batches)), np.arange(300))


def test_plans_are_a_function_of_seed_and_epoch_alone():
    rows = make_rows(np.arange(100) % 7)
    once, again = plan(rows, epoch=3), plan(rows, epoch=3)
    np.random.seed(5)  # noqa: NPY002 - the global state must not matter
    later = plan(rows, epoch=3)
    for other in (again, later):
        assert all(np.array_equal(a, b) for a, b in zip(once.batches, other.batches, strict=True))
    assert not np.array_equal(np.concatenate(once.batches), np.concatenate(plan(rows, epoch=4).batches))
    assert not np.array_equal(np.concatenate(once.batches), np.concatenate(plan(rows, epoch=3, seed=1).batches))


def test_equal_texts_of_a_label_take_turns_over_the_epochs():
    rows = make_rows([0, 0, 0, 0, 1, 1], texts=[7, 7, 7, 8, 9, 10])
    drawn = set()
    for epoch in range(20):
        made = plan(rows, epoch=epoch)
        check_batches(rows, made.batches, batch_size=16)
        assert made.n_copies == 2 and made.n_rows == 4
        drawn |= set(np.concatenate(made.batches).tolist())
    assert drawn == set(range(6))


def test_equal_texts_of_two_labels_never_meet():
    rows = make_rows([0, 0, 0, 0, 1, 1, 1, 1], texts=[0, 1, 2, 3, 0, 1, 2, 3])
    made = plan(rows)
    check_batches(rows, made.batches, batch_size=16)
    assert len(made.batches) >= 2 and made.n_rows == 8


def test_a_lone_row_teaches_the_classifier_or_is_left_out_and_counted():
    rows = make_rows([0, 0, 1, 2], classifier=[True, True, True, False])
    made = plan(rows)
    assert sorted(np.concatenate(made.batches).tolist()) == [0, 1, 2]
    assert made.n_lone == 1


def test_upsampling_repeats_small_classes_without_a_text_twice_in_a_batch():
    rows = make_rows([0] * 40 + [1] * 5)
    made = plan(rows, upsample=True)
    check_batches(rows, made.batches, batch_size=16)
    counts = np.bincount(rows.codes[np.concatenate(made.batches)])
    assert counts[0] == 40 and counts[1] == 40


def test_downsampling_draws_other_rows_each_epoch():
    rows = make_rows([0] * 40 + [1] * 6)
    drawn = set()
    for epoch in range(30):
        made = plan(rows, downsample=True, epoch=epoch)
        check_batches(rows, made.batches, batch_size=16)
        chosen = np.concatenate(made.batches)
        assert np.bincount(rows.codes[chosen]).tolist() == [6, 6]
        drawn |= set(chosen.tolist())
    assert len(drawn) == 46


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_promises_hold_for_any_rows(data):
    n = data.draw(st.integers(1, 60))
    ints = lambda top: data.draw(st.lists(st.integers(0, top), min_size=n, max_size=n))  # noqa: E731
    metric, classifier = np.array(ints(1), bool), np.array(ints(1), bool)
    classifier |= ~metric  # a row with neither mask does not come this far
    rows = make_rows(ints(5), metric=metric, classifier=classifier, texts=ints(25))
    samples = data.draw(st.integers(2, 4))
    batch_size = data.draw(st.integers(samples + 1, 20))
    sampling = data.draw(st.sampled_from([{}, {"upsample": True}, {"downsample": True}]))
    made = plan(rows, batch_size=batch_size, samples_per_class=samples, **sampling)
    check_batches(rows, made.batches, batch_size=batch_size)
    if not sampling:
        together = np.concatenate([*made.batches, np.zeros(0, np.int64)])
        assert len(np.unique(together)) == len(together) == n - made.n_copies - made.n_lone


def test_random_batches_would_leave_anchors_without_a_positive():
    """The control: at 77 classes and 64 rows a plain shuffle leaves many anchors alone."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 77, 6400)
    alone = [np.unique(codes[batch], return_counts=True)[1] for batch in rng.permutation(6400).reshape(100, 64)]
    assert np.mean([counts[counts == 1].sum() / 64 for counts in alone]) == pytest.approx(0.44, abs=0.03)

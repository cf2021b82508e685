"""SupCon and cross-entropy as sums: against a double loop, against pytorch-metric-learning, and at their edges."""

import math

import numpy as np
import pytest
import torch

from metric_parts.losses import count_anchors, cross_entropy, supcon

TEMPERATURE = 0.1


def unit_rows(n, *, d=8, seed=0):
    rows = torch.tensor(np.random.default_rng(seed).normal(size=(n, d)), dtype=torch.float32)
    return rows.requires_grad_()


def naive_supcon(vectors, codes, mask, temperature):
    """The mean over anchors with a positive, written as the formula stands in the paper."""
    rows = [i for i in range(len(codes)) if mask[i]]
    z = {i: vectors[i] / vectors[i].norm() for i in rows}
    losses = []
    for i in rows:
        positives = [p for p in rows if p != i and codes[p] == codes[i]]
        if not positives:
            continue
        denominator = sum(math.exp(float(z[i] @ z[a]) / temperature) for a in rows if a != i)
        shares = [math.log(math.exp(float(z[i] @ z[p]) / temperature) / denominator) for p in positives]
        losses.append(-sum(shares) / len(positives))
    return sum(losses) / len(losses)


def test_supcon_is_the_double_loop_of_the_paper():
    vectors = unit_rows(12)
    codes = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 0])
    mask = torch.tensor([True] * 10 + [False, True])
    loss = supcon(vectors, codes, mask, temperature=TEMPERATURE)
    assert loss.n == 10  # row 9 is alone in its label, row 10 is masked out
    assert float(loss.total.detach()) / loss.n == pytest.approx(
        naive_supcon(vectors.detach(), codes, mask, TEMPERATURE), rel=1e-5
    )


def test_supcon_is_that_of_pytorch_metric_learning_where_every_anchor_has_a_positive():
    from pytorch_metric_learning.losses import SupConLoss

    vectors, codes = unit_rows(16), torch.arange(16) % 4
    ours = supcon(vectors, codes, torch.ones(16, dtype=torch.bool), temperature=TEMPERATURE)
    theirs = SupConLoss(temperature=TEMPERATURE)(vectors, codes)
    assert (ours.total / ours.n).item() == pytest.approx(theirs.item(), rel=1e-5)
    (our_gradient,) = torch.autograd.grad(ours.total / ours.n, vectors, retain_graph=True)
    (their_gradient,) = torch.autograd.grad(theirs, vectors)
    assert torch.allclose(our_gradient, their_gradient, atol=1e-5)


@pytest.mark.parametrize(
    ("codes", "mask", "n_anchors"),
    [
        ([0, 0, 1, 1], [0, 0, 0, 0], 0),  # all masked out
        ([0, 0, 1, 1], [1, 0, 0, 0], 0),  # one row
        ([0, 1, 2, 3], [1, 1, 1, 1], 0),  # no positive
        ([5, 5, 5, 5], [1, 1, 1, 1], 4),  # one class: no negative, still pulled together
    ],
)
def test_supcon_and_its_gradient_are_finite_at_the_edges(codes, mask, n_anchors):
    vectors = unit_rows(4)
    loss = supcon(vectors, torch.tensor(codes), torch.tensor(mask, dtype=torch.bool), temperature=TEMPERATURE)
    loss.total.backward()
    assert loss.n == n_anchors
    assert torch.isfinite(loss.total) and torch.isfinite(vectors.grad).all()
    if n_anchors == 0:
        assert loss.total.item() == 0 and not vectors.grad.any()


def test_supcon_survives_a_temperature_at_which_the_own_cosine_would_drown_all_others():
    vectors = torch.eye(4).repeat_interleave(2, dim=0)
    vectors[1::2] = -vectors[0::2]  # the positives of an anchor are opposite to it
    vectors.requires_grad_()
    codes = torch.arange(4).repeat_interleave(2)
    loss = supcon(vectors, codes, torch.ones(8, dtype=torch.bool), temperature=0.002)
    loss.total.backward()
    assert torch.isfinite(loss.total) and torch.isfinite(vectors.grad).all()


def test_supcon_does_not_depend_on_the_order_of_rows():
    vectors, codes = unit_rows(10).detach(), torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3, 4])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(10, dtype=torch.bool)
    straight = supcon(vectors, codes, mask, temperature=TEMPERATURE)
    shuffled = supcon(vectors[order], codes[order], mask, temperature=TEMPERATURE)
    assert float(straight.total) == pytest.approx(float(shuffled.total), rel=1e-6)


def test_supcon_is_computed_in_float32_under_autocast():
    vectors, codes = unit_rows(8).detach(), torch.arange(8) % 2
    mask = torch.ones(8, dtype=torch.bool)
    exact = supcon(vectors, codes, mask, temperature=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = supcon(vectors, codes, mask, temperature=0.02)
    assert inside.total.dtype == torch.float32
    assert float(inside.total) == float(exact.total)


def test_count_anchors_knows_before_the_vectors_do():
    codes = np.array([0, 0, 1, 2, 2, 2, 3, 0])
    mask = np.array([1, 1, 1, 1, 1, 0, 1, 0], bool)
    assert count_anchors(codes, mask) == 4
    assert count_anchors(codes, np.zeros(8, bool)) == 0
    loss = supcon(unit_rows(8), torch.tensor(codes), torch.tensor(mask), temperature=1.0)
    assert loss.n == 4


def test_cross_entropy_of_no_rows_is_zero_with_a_gradient_of_zero():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.bool))
    loss.total.backward()
    assert loss.n == 0 and loss.total.item() == 0 and not logits.grad.any()


def test_cross_entropy_counts_masked_rows_only():
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0], [9.0, 0.0]])
    loss = cross_entropy(logits, torch.tensor([0, 1, 1]), torch.tensor([True, True, False]))
    assert loss.n == 2
    assert float(loss.total) == pytest.approx(math.log1p(math.exp(-2)) + math.log1p(math.exp(-3)), rel=1e-6)

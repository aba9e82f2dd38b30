"""Several rewards as one, on numbers that can be worked out by hand."""

import pytest
import torch

from flowscale_lite.judges import lexicographic, weighted


def column(k, factor=1.0):
    return lambda x: factor * x[:, k]


def test_weights_count_on_a_common_scale_whatever_the_units():
    sample = torch.tensor([[0.0, 5.0], [2.0, 1.0], [4.0, 3.0]])  # means 2 and 3, deviations 2 and 2
    x = torch.tensor([[2.0, 3.0], [4.0, 3.0], [2.0, 7.0]])
    for unit in (1.0, 1000.0):
        reward = weighted([(column(0), 1.0), (column(1, unit), 0.5)], sample)
        torch.testing.assert_close(reward(x), torch.tensor([0.0, 1.0, 1.0]))


def test_the_second_reward_decides_among_equals_only():
    x = torch.tensor([[3.0, -1e6], [2.0, 1e6], [3.1, 0.5], [3.0, 0.4]])
    order = lexicographic(column(0), column(1), 1.0)(x).argsort(descending=True)
    assert order.tolist() == [2, 3, 0, 1]
    fine = lexicographic(column(0), column(1), 0.1)(x)
    assert fine.argmax() == 2 and fine[3] > fine[0] > fine[1]


def test_a_reward_without_scale_is_refused():
    with pytest.raises(ValueError, match="reward 1 is the same on all 4 pictures"):
        weighted([(column(0), 1.0), (lambda x: torch.ones(len(x)), 1.0)], torch.rand(4, 2))
    with pytest.raises(ValueError, match="the same on all 1"):
        weighted([(column(0), 1.0)], torch.rand(1, 2))
    with pytest.raises(ValueError, match="at least one pair"):
        weighted([], torch.rand(4, 2))
    with pytest.raises(ValueError, match="least must be positive"):
        lexicographic(column(0), column(1), 0.0)


def test_a_reward_that_edits_its_pictures_leaves_the_others_alone():
    def rude(x):
        r = x.mean((1, 2, 3))
        x.zero_()
        return r

    x = torch.rand(5, 3, 4, 4)
    plain = lambda x: x[:, 0].mean((1, 2))  # noqa: E731
    mean = lambda x: x.mean((1, 2, 3))  # noqa: E731
    for made in (lambda a: weighted([(a, 1.0), (plain, 1.0)], x), lambda a: lexicographic(a, plain, 0.5)):
        assert torch.equal(made(rude)(x), made(mean)(x)) and x.any()

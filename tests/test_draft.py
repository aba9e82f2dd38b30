"""Draft and Cascade are these loops, written by hand on the same generator."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import MIXTURE, drawn, never, problem, seeded, wish

from flowscale_lite import Cascade, Draft, search, uniform
from flowscale_lite.look_ahead import ode, posterior_mean, sibling


def few_step(x, t):
    """Another model of the same states, which sees a little less far."""
    return 0.9 * MIXTURE(x, t)


def setup(steps, **changes):
    return problem(steps, **{"look_ahead": sibling(few_step)} | changes)


def drafted(x, t):
    return x - t * few_step(x, x.new_full((len(x),), t))


def finished(x, times):
    for t, s in pairwise(times):
        x = x + (s - t) * MIXTURE(x, x.new_full((len(x),), t))
    return x


def redrawn(n, eps, g):
    """One of two numbers drawn afresh."""
    first = torch.rand(n, 2, generator=g).argsort(1)[:, :1] == 0
    return torch.where(torch.cat([first, ~first], 1), torch.randn(n, 2, generator=g), eps)


@pytest.mark.parametrize(("init", "batch", "drafts"), [(1, 1, 0.5), (6, 4, 0.5), (5, 3, 0.8)])
def test_draft_is_this_loop(init, batch, drafts):
    """50 evaluations, 5 a finished sample: 5 or 2 samples are finished, and drafts take the rest."""
    kept = {0.5: 5, 0.8: 2}[drafts]
    for seed in range(5):
        g = seeded(seed)
        eps = torch.randn(init, 2, generator=g)
        r, spent = wish(drafted(eps, 1.0)), init
        while spent < 50 - 5 * kept:
            n = min(batch, 50 - 5 * kept - spent)
            new = redrawn(n, eps[r.argmax()], g)
            spent += n
            eps, r = torch.cat([eps, new]), torch.cat([r, wish(drafted(new, 1.0))])
            top = r.topk(min(kept, len(r))).indices
            eps, r = eps[top], r[top]
        ends = finished(eps, uniform(5))
        found = search(setup(5), Draft(init, drafts, 0.5, 4, batch), max_nfe=50, generator=seeded(seed))
        torch.testing.assert_close(found.best, ends[wish(ends).argmax()])
        assert (found.nfe, found.left, drawn(found)[-1]) == (50, 0, kept)


@pytest.mark.parametrize(("init", "batch", "level", "steps"), [(1, 1, 0.8, 3), (4, 3, 0.5, 5)])
def test_cascade_is_this_loop(init, batch, level, steps):
    """60 evaluations, half of them drafts; levels are .8, .6, .4 and .2, an equal part of either half each."""
    levels = uniform(5)[1:-1]
    for seed in range(5):
        g = seeded(seed)
        eps = torch.randn(init, 2, generator=g)
        eps = eps[wish(drafted(eps, 1.0)).argmax()][None]
        x0, spent = drafted(eps, 1.0), init
        while spent < 30:
            n, s = min(batch, 30 - spent), levels[spent * 4 // 30]
            x = (1 - s) * x0 + s * redrawn(n, eps, g)
            y, spent = drafted(x, s), spent + n
            i = wish(y).argmax()
            if wish(y)[i] > wish(x0)[0]:
                x0, eps = y[i : i + 1], ((x - (1 - s) * y) / s)[i : i + 1]
        start = 0.8 if level == 0.8 else 0.4  # the schedule's first time not above it
        x = (1 - start) * x0 + start * eps
        x0, spent = finished(x, [start * k / steps for k in range(steps, -1, -1)]), spent + steps
        eps = (x - (1 - start) * x0) / start
        while 60 - spent >= steps:
            n, s = min(2, (60 - spent) // steps), levels[math.floor((spent - 30) * 4 / 30)]
            x = (1 - s) * x0 + s * redrawn(n, eps, g)
            y, spent = finished(x, [s * k / steps for k in range(steps, -1, -1)]), spent + n * steps
            i = wish(y).argmax()
            if wish(y)[i] > wish(x0)[0]:
                x0, eps = y[i : i + 1], ((x - (1 - s) * y) / s)[i : i + 1]
        method = Cascade(init, 0.5, level, steps, 0.5, 4, batch)
        found = search(setup(5), method, max_nfe=60, generator=seeded(seed))
        torch.testing.assert_close(found.best, x0[0], rtol=1e-4, atol=1e-5)
        assert (found.nfe, found.left) == (spent, 60 - spent)


@pytest.mark.parametrize("method", [Draft(), Cascade()])
@pytest.mark.parametrize("look", [posterior_mean, ode(3)])
def test_without_a_sibling_nothing_is_drafted(method, look):
    with pytest.raises(ValueError, match=r"drafts need look_ahead.sibling\(velocity\)"):
        search(setup(5, look_ahead=look, velocity=never), method, max_nfe=50, generator=seeded())


def test_settings_of_a_budget():
    """Stored results rest on them."""
    assert Draft.multi_step(100) == Draft(15, 0.6, 0.4, 4, 5) and Draft.multi_step(100, cost=2) == Draft(8)
    assert Cascade.multi_step(100) == Cascade(12, 0.5, 0.8, 5, 0.4, 4, 5) and Cascade.multi_step(1) == Cascade(1)

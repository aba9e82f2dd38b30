"""Every search method against a loop written without the package, and what is particular to one of them."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import MEAN, MIXTURE, STD, Counting, drawn, flat, problem, seeded, wish

from flowscale_lite import (
    LINEAR,
    RBF,
    SVDD,
    Beam,
    BestOfEnough,
    BestOfN,
    BestOfQuota,
    Blockwise,
    FirstImprovement,
    GaussianMixture,
    Guide,
    Problem,
    Refine,
    SearchOverPaths,
    ZeroOrder,
    ode,
    quadratic,
    sde,
    search,
    steps,
    uniform,
)
from flowscale_lite.beyond.refine import regions


def at(x, t):
    return MIXTURE(x, torch.full((len(x),), t))


def look(x, t):
    """Look-ahead rewards (K,)."""
    return wish(x - t * at(x, t))


def ancestral(x, t, s, g):
    """The DDPM transition on the linear path, by hand."""
    v, rho = at(x, t), s * (1 - t) / ((1 - s) * t)
    z = torch.randn(x.shape, generator=g) if s > 0 else 0.0
    return (1 - s) * (x - t * v) + s * rho * (x + (1 - t) * v) + s * math.sqrt(1 - rho**2) * z


def best_rows(x, t, groups):
    """The best of each of `groups` runs of neighbouring rows."""
    return x.view(groups, -1, 2)[torch.arange(groups), look(x, t).view(groups, -1).argmax(1)]


def assert_found(method, budget, seed, x, **changes):
    """The search's result is the best of the samples x; returned for more questions."""
    result = search(problem(**changes), method, max_nfe=budget, generator=seeded(seed))
    torch.testing.assert_close(result.best, x[wish(x).argmax()], rtol=1e-4, atol=1e-4)
    return result


# Best-of-N


@pytest.mark.parametrize(("n", "budget", "rows"), [(None, 53, 10), (None, 5, 1), (4, 53, 4), (10, 50, 10)])
def test_best_of_n_is_this_loop_and_as_many_samples_as_the_budget_pays_for(n, budget, rows):
    g = seeded(3)
    x = torch.randn(rows, 2, generator=g)
    for t, s in pairwise(uniform(5)):
        v = at(x, t)
        score = -(x + (1 - t) * v) / t
        x = x - (t - s) * (v - (3 * t**2) ** 2 / 2 * score if s > 0 else v)
        if s > 0:
            x = x + 3 * t**2 * math.sqrt(t - s) * torch.randn(rows, 2, generator=g)
    result = assert_found(BestOfN(n), budget, 3, x, kernel=sde(quadratic()))
    assert result.nfe == 5 * rows and result.reward_calls == rows


def test_the_best_of_n_is_the_largest_of_n_normals():
    """Under the exact ODE x0 = MEAN + STD * noise, and the largest of 3 standard normals has mean 3/(2 sqrt(pi))."""
    one_step = lambda x, t: (1 - STD) * x - MEAN  # noqa: E731  (the straight flow to N(MEAN, STD^2), exact in one step)
    straight = Problem(one_step, lambda x: x[:, 0], LINEAR, ode, (1.0, 0.0), (1,))
    g = seeded()
    got = torch.tensor([search(straight, BestOfN(), max_nfe=3, generator=g).reward for _ in range(800)])
    # The largest of 3 has standard deviation 0.748 STD; four standard errors.
    assert got.mean() == pytest.approx(MEAN + STD * 1.5 / math.sqrt(math.pi), abs=4 * 0.748 * STD / math.sqrt(800))


# SVDD and CoDe


def plain_blockwise(chains, init, block, copies, g):
    times = uniform(6)
    x = torch.randn(chains * init, 2, generator=g)
    x = best_rows(x, 1.0, chains) if init > 1 else x
    for k, (t, s) in enumerate(pairwise(times)):
        if k % block == 0 and t > times[-2]:
            x = x.repeat_interleave(copies, 0)
        x = ancestral(x, t, s, g)
        if (k + 1) % block == 0 and s > 0:
            x = best_rows(x, s, chains)
    return x


@pytest.mark.parametrize(("chains", "init", "copies"), [(1, 1, 4), (2, 3, 5), (3, 1, 1)])
def test_svdd_is_this_loop(chains, init, copies):
    for seed in range(5):
        x = plain_blockwise(chains, init, 1, copies, seeded(seed))
        assert_found(SVDD(chains, init, copies), 200, seed, x, steps=6)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 6, 9])
def test_blockwise_is_this_loop(block):
    for seed in range(5):
        x = plain_blockwise(2, 2, block, 4, seeded(seed))
        assert_found(Blockwise(2, 2, block, 4), 200, seed, x, steps=6)


def test_a_schedule_may_have_nothing_to_select():
    """One transition, free: only the first noises are spent."""
    for method in (SVDD(2, 3), Blockwise(2, 3), Beam(2, 3), RBF(3, chains=2)):
        result = search(problem(1), method, max_nfe=40, generator=seeded())
        assert drawn(result) == [6, 2] and result.left == 34


# Search over Paths


def plain_paths(steps, paths, copies, up, down, g):
    times = uniform(steps)
    x = torch.randn(paths, 2, generator=g)
    i, rows = 0, paths
    while True:
        for _ in range(down):
            if i < steps:
                x = x + (times[i + 1] - times[i]) * at(x, times[i])
                i += 1
                rows += len(x) * (i < steps)
        if len(x) > paths:
            x = x[(look(x, times[i]) if i < steps else wish(x)).topk(paths).indices]
        if i == steps:
            return x, rows
        t, s = times[i], times[i - up]
        b = (1 - s) / (1 - t)
        x = x.repeat_interleave(copies, 0)
        x = b * x + math.sqrt(s**2 - (b * t) ** 2) * torch.randn(x.shape, generator=g)
        i, rows = i - up, rows + len(x)


@pytest.mark.parametrize(("up", "down"), [(1, 2), (1, 3), (2, 3), (3, 4), (1, 5)])
def test_search_over_paths_is_this_loop(up, down):
    for seed in range(5):
        x, rows = plain_paths(6, 2, 5, up, down, seeded(seed))
        assert assert_found(SearchOverPaths(2, 5, up=up, down=down), 500, seed, x, steps=6).nfe == rows


@pytest.mark.parametrize(("up", "down"), [(2, 2), (3, 2)])
def test_paths_that_never_end_are_refused(up, down):
    with pytest.raises(ValueError, match="further down than up"):
        SearchOverPaths(up=up, down=down)


# Zero-order search


@pytest.mark.parametrize("init", [1, 3])
@pytest.mark.parametrize("radius", [0.3, 1.0])
def test_zero_order_is_this_loop(init, radius):
    def sample(x):
        for t, s in pairwise(uniform(4)):
            x = x + (s - t) * at(x, t)
        return x

    for seed in range(5):
        g = seeded(seed)
        noise = torch.randn(init, 2, generator=g)
        pivot = best_rows(noise, 1.0, 1) if init > 1 else noise
        best, left, rounds = sample(pivot), 50 - init - 3, [init]
        while left >= 4:
            n = min(3, left // 4)
            noise = math.sqrt(1 - radius**2) * pivot + radius * torch.randn(n, 2, generator=g)
            x = sample(noise)
            i = wish(x).argmax()
            if wish(x)[i] > wish(best)[0]:
                pivot, best = noise[i : i + 1], x[i : i + 1]
            left -= 4 * n
            rounds.append(n)
        result = assert_found(ZeroOrder(3, radius, init), 50, seed, best, steps=4)
        # every step draws its round's samples at 4 times and the next round's noises
        assert result.left == left and drawn(result) == [init, *(4 * n + m for n, m in pairwise([1, *rounds[1:], 0]))]


def test_noises_of_neighbours_keep_their_size():
    """In 1,000 dimensions, when every round moves on: |x|^2/1000 is 1, spread 0.045; sums would have grown to 6."""
    calls = []

    def ever_better(x):
        calls.append(len(x))
        return x.new_full((len(x),), float(len(calls)))

    setup = problem(1, lambda x, t: x / 2, ever_better, shape=(1000,))
    found = steps(setup, ZeroOrder(5, 0.5), max_nfe=101, generator=seeded())
    noises = [found.particles.x for _ in found][:-1]
    assert len(calls) == 21 and (noises[-1].square().mean(1) - 1).abs().max() < 4 * 0.045
    along = (noises[1] * noises[0]).mean(1) / noises[0].square().mean()
    assert (along - math.sqrt(0.75)).abs().max() < 4 * 0.5 / math.sqrt(1000)


def test_neighbours_descend_from_the_row_that_became_their_pivot():
    found = steps(problem(4), ZeroOrder(3), max_nfe=100, generator=seeded())
    rounds = list(pairwise([found.particles for _ in found][:-1]))
    moved = [(a, b) for a, b in rounds if b.carry["record"][0] > a.carry["record"][0]]
    assert all((b.parent == b.parent[0]).all() and b.parent[0] < len(a) for a, b in rounds)
    assert all(torch.equal(b.carry["pivot"][0], a.x[b.parent[0]]) for a, b in moved)
    assert any(b.parent[0] > 0 for _, b in moved)


# Refine


@pytest.mark.parametrize(("init", "batch"), [(1, 1), (3, 2), (5, 4)])
def test_refine_is_this_loop(init, batch):
    for seed in range(5):
        g = seeded(seed)
        eps = best_rows(torch.randn(init, 2, generator=g), 1.0, 1)
        x0 = eps - at(eps, 1.0)
        levels, rows, spent, rounds = uniform(4)[1:-1], 50 - init, 0, [init]
        for k, s in enumerate(levels):
            while spent < (k + 1) * rows / len(levels):
                n = min(batch, math.ceil((k + 1) * rows / len(levels)) - spent)
                first = torch.rand(n, 2, generator=g).argsort(1)[:, :1] == 0  # which of the two numbers is redrawn
                where = torch.cat([first, ~first], 1)
                x = (1 - s) * x0 + s * torch.where(where, torch.randn(n, 2, generator=g), eps)
                v = at(x, s)
                i = wish(x - s * v).argmax()
                if wish(x - s * v)[i] > wish(x0)[0]:
                    x0, eps = (x - s * v)[i : i + 1], (x + (1 - s) * v)[i : i + 1]
                spent += n
                rounds.append(n)
        result = assert_found(Refine(init, 0.5, 4, batch), 50, seed, x0, steps=4)
        assert drawn(result) == [*rounds, 1] and result.left == 0


@pytest.mark.parametrize(
    ("shape", "whole", "part"),
    [
        ((3, 8, 8), (1, 8, 8), 4 / 16),
        ((2, 3), (2, 3), 2 / 6),
        ((8,), (8,), 2 / 8),
        ((4, 2, 4, 8), (1, 2, 4, 8), 8 / 32),
    ],
)
def test_regions_are_blocks_of_the_share_asked_for(shape, whole, part):
    """Every region is chosen equally often: 4,000 choices, the largest deviation of the shares below 4.5 SE."""
    where = regions(4000, shape, 0.25, 4, seeded())
    assert where.shape == (4000, *whole) and where.dtype == torch.bool
    assert (where.float().mean(0) - part).abs().max() < 4.5 * math.sqrt(part * (1 - part) / 4000)
    assert (where.flatten(1).sum(1) == round(part * math.prod(whole))).all()
    if shape == (3, 8, 8):
        blocks = where.view(4000, 4, 2, 4, 2).float().mean((2, 4))
        assert ((blocks == 0) | (blocks == 1)).all(), "a region is redrawn as a whole"


def test_refine_leaves_the_other_regions_alone():
    """Under a velocity that acts entry by entry, an accepted try changes no more than the share."""
    setup = problem(velocity=lambda x, t: x / 2, reward=lambda x: x.flatten(1).sum(1), shape=(3, 8, 8))
    found = steps(setup, Refine(share=0.25, batch=1), max_nfe=60, generator=seeded())
    holders = [found.particles for _ in found][1:-1]
    changed = [((b.x - a.x).abs() > 1e-4).any(1).float().mean() for a, b in pairwise(holders) if a.t == b.t]
    assert len(changed) > 20 and max(changed) <= 0.25 and max(changed) > 0


# Beam


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("below", [1.0, 0.7])
@pytest.mark.parametrize(("states", "init", "enough"), [(4, 1, 24), (5, 3, 2), (8, 2, 4)])
def test_beam_is_this_loop(states, init, enough, below, narrow):
    """6 steps, 5 of them to pay for; below 0.7 the last 4 of them select, by quotas that roll over."""
    kept = [round(states ** ((4 - k) / 5)) if narrow else states for k in range(5)]
    selecting = 4 if below == 0.7 else 5
    for seed in range(5):
        g = seeded(seed)
        x = torch.randn(states * init, 2, generator=g)
        rounds, rows = [len(x)], 300 - len(x) - (5 - selecting) * states
        x, left = best_rows(x, 1.0, states), rows
        for k, (t, s) in enumerate(pairwise(uniform(6))):
            selects, ahead, n = 0 < s <= below, 5 - k, 1
            if selects:
                n = (left - rows * (ahead - 1) // selecting) // len(x)
                n = min(n, max(enough, left // len(x) // 4 ** (ahead - 1)))
            x = ancestral(x.repeat_interleave(n, 0), t, s, g)
            rounds.append(len(x))
            if selects:
                left -= len(x)
                x = x[look(x, s).topk(kept[k]).indices]
        result = assert_found(Beam(states, init, enough, below, narrow), 300, seed, x, steps=6)
        assert drawn(result) == rounds and result.left == left


def test_a_beam_keeps_the_best_candidates_whosever_they_are():
    scored = []
    judge = lambda x: scored.append(wish(x)) or scored[-1]  # noqa: E731
    found = steps(problem(3, reward=judge), Beam(3), max_nfe=50, generator=seeded(5))
    kept = [found.particles for _ in found]
    assert drawn(found.result()) == [3, 24, 21, 3] and found.run.left == 2
    for candidates, p in zip(scored[1:3], kept[1:3], strict=True):
        assert sorted(p.reward.tolist()) == sorted(candidates.topk(3).values.tolist())
    assert len(set(kept[2].parent.tolist())) == 1  # the children of one state are all that is left


def test_a_narrow_beam_falls_geometrically_to_one_state():
    result = search(problem(5), Beam(8, narrow=True), max_nfe=200, generator=seeded())
    assert [step.kept for step in result.trace] == [8, 5, 3, 2, 1, 1]  # 8 to the powers 1, 3/4, 1/2, 1/4 and 0


def test_above_select_below_one_is_drawn_and_none_refused():
    """Times 0.8 and 0.6 land above 0.5: one row each; the other 40 - 1 - 2 rows to 0.4 and 0.2."""
    result = search(problem(reward=flat), Beam(1, select_below=0.5), max_nfe=40, generator=seeded())
    assert drawn(result) == [1, 1, 1, 19, 18, 1] and result.left == 0
    with pytest.raises(ValueError, match="no transition lands"):
        Beam(select_below=0.1).check(problem(), 400)


# Rollover budget forcing


def plain_rbf(judge, chains, init, budget, finish, g):
    """The paper's loop with one candidate at a time and the DDPM transition in 6 steps, written without the package.

    Returns the last states and the number of candidates of every chain at every transition.
    """
    times, x = uniform(6), torch.randn(chains * init, 2, generator=g)
    rows = [(budget - chains * init + i) // chains for i in range(chains)]  # of each chain, for candidates
    states, saved, used = [], [0] * chains, []
    for own in x.split(init):
        r = judge(own - at(own, 1.0))
        states.append((own[r.argmax()][None], float(r.max())))
    for k, (t, s) in enumerate(pairwise(times[:-1])):
        for c, (x, record) in enumerate(states):
            quota = rows[c] * (5 - k) // 5 - rows[c] * (4 - k) // 5 + saved[c]
            best, n = None, 0
            while n < quota:
                y = ancestral(x, t, s, g)
                r, n = float(judge(y - s * at(y, s))), n + 1
                if best is None or r > best[1]:
                    best = (y, r)  # the fallback, if none beats the record
                if r > record and not (finish and k == 4):
                    break
            saved[c] = quota - n
            states[c] = best[0], max(record, best[1])
            used.append(n)
    return torch.cat([x - times[-2] * at(x, times[-2]) for x, _ in states]), used


@pytest.mark.parametrize("judge", [wish, lambda x: wish(x).round(), flat], ids=["smooth", "integer", "flat"])
@pytest.mark.parametrize("chains", [1, 2])
@pytest.mark.parametrize("finish", [True, False])
def test_rbf_is_the_papers_loop(judge, chains, finish):
    for seed in range(15):
        budget = 47 * chains + 1
        x, used = plain_rbf(judge, chains, 4, budget, finish, seeded(seed))
        method = RBF(init=4, rule=FirstImprovement(), batch=1, chains=chains, finish=finish)
        result = search(problem(6, reward=judge), method, max_nfe=budget, generator=seeded(seed))
        assert drawn(result) == [4 * chains, *(sum(used[i : i + chains]) for i in range(0, 5 * chains, chains)), chains]
        torch.testing.assert_close(result.particles.x, x, rtol=1e-4, atol=1e-4)
        assert result.reward == pytest.approx(judge(x).max().item(), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("rule", [FirstImprovement(), BestOfQuota()], ids=repr)
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_without_success_every_transition_spends_its_quota(rule, batch):
    """54 rows over 5 transitions to pay for: the remainder is spread, and the free step draws one."""
    result = search(problem(6, reward=flat), RBF(7, rule, batch), max_nfe=7 + 54, generator=seeded())
    assert drawn(result) == [7, 11, 11, 11, 11, 10, 1] and result.left == 0


class Script:
    """A reward that answers its calls, counted from 0, as a script says, and otherwise 0."""

    def __init__(self, script: dict[int, float]):
        self.script, self.asked = script, []

    def __call__(self, x):
        first = len(self.asked)
        self.asked += list(x.clone())
        return x.new_tensor([self.script.get(first + i, 0.0) for i in range(len(x))])


@pytest.mark.parametrize(
    ("script", "finish", "expected", "left"),
    [
        ({2: 1}, True, [2, 1, 19, 10, 10, 1], 0),
        ({2: 1}, False, [2, 1, 19, 10, 10, 1], 0),
        ({2: 1, 3: 2, 4: 3, 5: 4}, True, [2, 1, 1, 1, 37, 1], 0),
        ({2: 1, 3: 2, 4: 3, 5: 4}, False, [2, 1, 1, 1, 1, 1], 36),
    ],
)
def test_what_a_quota_leaves_rolls_over_to_the_next_transition(script, finish, expected, left):
    """Candidates that improve are taken at once; quota 10. At the last transition there is nothing to save for."""
    method = RBF(2, FirstImprovement(), batch=1, finish=finish)
    result = search(problem(5, reward=Script(script)), method, max_nfe=42, generator=seeded())
    assert drawn(result) == expected and result.left == left


def test_a_speculative_batch_takes_the_first_that_beats_the_record_and_pays_for_all():
    """Calls 0 and 1 are the first draws; 4 and 5 improve, the third and fourth of the first batch of six."""
    reward = Script({4: 1.0, 5: 2.0})
    method = RBF(2, FirstImprovement(), batch=6, finish=False)
    result = search(problem(3, reward=reward), method, max_nfe=26, generator=seeded())
    assert drawn(result) == [2, 6, 18, 1] and result.trace[1].accepted == 1.0 and result.trace[1].best == 2.0
    assert torch.equal(result.seen, reward.asked[5])  # the better one, which the rule passed over, is still reported


def test_the_record_is_the_best_accepted_so_far_and_never_falls():
    """Accepted 5, then -1 for want of better: a candidate of 0 beats the parent but not the record."""
    reward = Script({0: 5.0, 1: -1.0, 2: -1.0})
    result = search(problem(4, reward=reward), RBF(1, FirstImprovement(), batch=1), max_nfe=1 + 6, generator=seeded())
    assert drawn(result) == [1, 2, 2, 2, 1]


def test_the_best_of_enough_is_taken_and_the_rest_rolls_over_to_the_end():
    """500 rows for 5 transitions, 100 each: 24 do, but 452 // 16 of the last three's, 424 // 4 of the last two's."""
    for method, budget, expected in (
        (RBF(1), 501, [1, 24, 24, 28, 106, 318, 1]),
        (RBF(1, BestOfEnough(7)), 51, [1, 7, 7, 7, 7, 22, 1]),
        (Beam(2), 1002, [2, 48, 48, 56, 212, 636, 2]),
    ):
        assert drawn(search(problem(6), method, max_nfe=budget, generator=seeded())) == expected


def test_chains_are_independent_share_the_budget_and_return_the_best():
    """31 rows for 3 chains: 10, 10 and 11; 2 first draws each, then 2 transitions of 4 (or 5) rows."""
    method = RBF(2, FirstImprovement(), chains=3)
    result = search(problem(3, reward=flat), method, max_nfe=31, generator=seeded())
    assert drawn(result) == [6, 13, 12, 3] and result.left == 0
    found = steps(problem(3), RBF(2, chains=3), max_nfe=31, generator=seeded())
    kept = [found.particles for _ in found]
    assert (kept[0].parent // 2).tolist() == [0, 1, 2]  # each chain starts from one of its own two draws
    assert [p.parent.tolist() for p in kept[1:]] == [[0, 1, 2]] * 3


@pytest.mark.parametrize("chains", [1, 2])
def test_a_guide_is_paid_for_once_a_transition_and_chain(chains):
    least = chains * (3 + 4 + 3 * 4)  # first noises, one candidate and three units for the gradient a transition
    method = RBF(3, chains=chains, guide=Guide(0.5))
    result = search(problem(velocity=Counting(MIXTURE)), method, max_nfe=least + 41, generator=seeded())
    assert result.left == 0 and result.gradients == 4 * chains
    with pytest.raises(ValueError, match=f"max_nfe >= {least};"):
        method.check(problem(), least - 1)


def test_rbf_beats_best_of_n():
    """Gaussian data, reward the first coordinate, 40 runs each: better by more than four standard errors."""
    one = GaussianMixture([[MEAN, MEAN]], STD).velocity(LINEAR)
    setup = problem(10, one, lambda x: x[:, 0], kernel=sde(quadratic()))
    rewards = [
        torch.tensor([search(setup, method, max_nfe=100, generator=seeded(i)).reward for i in range(40)])
        for method in (RBF(rule=BestOfQuota()), BestOfN())
    ]
    gain = rewards[0].mean() - rewards[1].mean()
    assert gain > 4 * (rewards[0].var() / 40 + rewards[1].var() / 40).sqrt()


# Settings that stored results and the paper's comparison rest on


def test_settings_by_name():
    assert RBF() == RBF(init=4, rule=BestOfEnough(24), batch=8, chains=1, finish=True, guide=None)
    assert RBF.published() == RBF(init=25, rule=FirstImprovement(), batch=1, chains=2, finish=True)
    assert RBF.few_step(100) == RBF(init=25, rule=FirstImprovement()) and RBF.few_step(3).init == 1
    assert Refine.few_step(100) == Refine(init=25, share=0.4, cells=4, batch=5) and Refine() == Refine(4, 0.4, 4, 5)
    assert Beam.multi_step(250) == Beam(states=7, init=1, enough=24, select_below=0.8)  # 250 // 32
    assert [Beam.multi_step(n).states for n in (40, 64, 96, 500)] == [2, 2, 3, 15]
    assert [Beam.multi_step(500, steps).states for steps in (10, 11, 50)] == [15, 15, 3]  # 3 a step from 11 steps on
    for named in (RBF.few_step, Refine.few_step, Beam.multi_step):
        assert named(200, cost=2) == named(100)


def test_enough_grows_fourfold_from_transition_to_transition():
    rule = BestOfEnough()
    assert [rule.most(10**6, 10_240, ahead) for ahead in range(1, 8)] == [10_240, 2560, 640, 160, 40, 24, 24]
    assert rule.most(20, 10_240, 3) == 20  # never beyond the quota


@pytest.mark.parametrize("named", [RBF.few_step, Refine.few_step, Beam.multi_step])
@pytest.mark.parametrize(("steps", "budget", "cost"), [(10, 40, 1), (10, 500, 1), (20, 250, 2)])
def test_settings_by_name_fit_their_budget(named, steps, budget, cost):
    method = named(budget, cost=cost)
    result = search(problem(steps, cost=cost), method, max_nfe=budget, generator=seeded())
    assert result.left < getattr(method, "states", 1) * cost

import math
import random
from dataclasses import replace
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from conftest import MEAN, STD, Counting, never, seeded

from flowscale_lite import (
    LINEAR,
    RBF,
    BestOfN,
    GaussianMixture,
    Guide,
    Problem,
    Refine,
    ddim,
    ode,
    quadratic,
    sde,
    search,
    uniform,
)
from flowscale_lite.methods.rbf import reached

MIXTURE = GaussianMixture([[-1.0, 0.5], [1.0, -0.5], [0.3, 1.4]], [0.3, 0.4, 0.2], [0.5, 0.3, 0.2]).velocity(LINEAR)


def reward(x):
    return -(x - x.new_tensor([1.2, 1.2])).square().sum(1)


def flat(x):
    return x.new_zeros(len(x))


def problem(steps=5, velocity=MIXTURE, reward=reward, kernel=None, **rest) -> Problem:
    return Problem(velocity, reward, LINEAR, kernel or ddim(1.0), uniform(steps), (2,), **rest)


def drawn(result) -> list[int]:
    return [step.drawn for step in result.trace]


# Best of N


@pytest.mark.parametrize(("n", "budget", "rows"), [(None, 53, 10), (None, 5, 1), (4, 53, 4), (10, 50, 10)])
@pytest.mark.parametrize("cost", [1, 3])
def test_best_of_n_spends_n_samples(n, budget, rows, cost):
    velocity = Counting(MIXTURE)
    result = search(problem(velocity=velocity, cost=cost), BestOfN(n), max_nfe=budget * cost, generator=seeded())
    assert velocity.rows == 5 * rows and result.nfe == 5 * rows * cost and result.reward_calls == rows


@pytest.mark.parametrize(("n", "budget"), [(None, 4), (3, 14)])
def test_best_of_n_refuses_a_budget_too_small(n, budget):
    with pytest.raises(ValueError, match="max_nfe >="):
        search(problem(velocity=never, reward=never), BestOfN(n), max_nfe=budget, generator=seeded())


def test_best_of_n_refuses_no_samples():
    with pytest.raises(ValueError, match="n must"):
        BestOfN(0)


def test_the_best_of_n_is_the_largest_of_n_normals():
    """Under the exact ODE x0 = MEAN + STD * noise, and the largest of 3 standard normals has mean 3/(2 sqrt(pi))."""
    one_step = lambda x, t: (1 - STD) * x - MEAN  # noqa: E731  (the straight flow to N(MEAN, STD^2), exact in one step)
    straight = Problem(one_step, lambda x: x[:, 0], LINEAR, ode, (1.0, 0.0), (1,))
    g = seeded()
    got = torch.tensor([search(straight, BestOfN(), max_nfe=3, generator=g).reward for _ in range(800)])
    # The largest of 3 has standard deviation 0.748 STD; four standard errors.
    assert got.mean() == pytest.approx(MEAN + STD * 1.5 / math.sqrt(math.pi), abs=4 * 0.748 * STD / math.sqrt(800))


# Rollover budget forcing


def test_rbf_books_balance_and_no_budget_is_lost():
    dice = random.Random(0)
    for seed in range(200):
        method = RBF(
            init=dice.randint(1, 6),
            accept=dice.choice(["first", "best", "reserve"]),
            batch=dice.randint(1, 9),
            enough=dice.randint(1, 30),
            chains=dice.randint(1, 4),
            spend_all=dice.random() < 0.7,
            select_below=dice.choice([1.0, 0.8, 0.5]),
        )
        if method.accept == "first":
            method = replace(method, quantile=dice.choice([None, 0.5, 1.0]))
        if method.accept != "reserve":
            method = replace(method, rollover=dice.random() < 0.7)
        if method.accept == "best" and method.rollover:
            method = replace(method, compete=dice.random() < 0.5)
        steps, cost = dice.randint(1, 8), dice.choice([1, 1, 2])
        least = cost * method.chains * (method.init + steps - 1)
        budget = least + dice.randint(0, 60)
        if steps > 1 and 1 / steps > method.select_below:
            method = replace(method, select_below=1 / steps)
        velocity = Counting(lambda x, t: x / 2)
        setup = problem(steps, velocity, dice.choice([reward, flat]), cost=cost)
        result = search(setup, method, max_nfe=budget, generator=seeded(seed))
        assert cost * velocity.rows == result.nfe <= budget and result.nfe + result.left == budget, method
        assert result.trace[-1].t == 0 and result.trace[0].drawn == method.chains * method.init
        assert all(step.drawn >= method.chains for step in result.trace)
        if steps > 1 and (method.accept != "first" or (method.rollover and method.spend_all)):
            rows = method.chains if method.compete else 1
            assert result.left < rows * cost, (method, result)  # less than one row (for every chain)
        with pytest.raises(ValueError, match=f"max_nfe >= {least}"):
            search(setup, method, max_nfe=least - 1, generator=seeded()) if least > 1 else method.check(setup, 0)


def plain_rbf(flow, reward, steps, init, budget, g, rollover=True):
    """The paper's loop with one candidate at a time and the DDPM transition, written without the package."""
    x = torch.randn(init, 2, generator=g)
    v = flow(x, torch.full((init,), 1.0))
    r = reward(x - v)
    i = r.argmax()
    x, v, record, left, saved, used = x[i : i + 1], v[i : i + 1], r[i], budget - init, 0, []
    times = uniform(steps)
    for k, (t, s) in enumerate(pairwise(times[:-1])):
        rows = budget - init
        share = rows * (steps - 1 - k) // (steps - 1) - rows * (steps - 2 - k) // (steps - 1)
        quota, best, n = share + saved, None, 0
        rho = s * (1 - t) / ((1 - s) * t)
        mean = (1 - s) * (x - t * v) + s * rho * (x + (1 - t) * v)
        while n < quota:
            y = mean + s * math.sqrt(1 - rho**2) * torch.randn(1, 2, generator=g)
            w = flow(y, torch.full((1,), s))
            q, n, left = reward(y - s * w), n + 1, left - 1
            if best is None or q > best[2]:
                best = (y, w, q)
            if q > record and k < steps - 2:
                break
        saved = quota - n if rollover else 0
        x, v, q = best
        record = max(record, q)
        used.append(n)
    return x - times[-2] * v, used


@pytest.mark.parametrize("judge", [reward, lambda x: reward(x).round(), flat], ids=["smooth", "integer", "flat"])
@pytest.mark.parametrize("rollover", [True, False])
def test_rbf_is_the_papers_loop(judge, rollover):
    for seed in range(15):
        x, used = plain_rbf(MIXTURE, judge, 6, 4, 47, seeded(seed), rollover)
        method = RBF(init=4, accept="first", batch=1, rollover=rollover)
        result = search(problem(6, reward=judge), method, max_nfe=47, generator=seeded(seed))
        assert drawn(result) == [4, *used, 1]
        torch.testing.assert_close(result.best, x[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("accept", ["first", "best"])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_without_success_every_paid_transition_spends_its_quota(accept, batch):
    """54 rows over 5 paid transitions of a 6-step schedule: the remainder is spread, and the free step draws one."""
    method = RBF(init=7, accept=accept, batch=batch)
    result = search(problem(6, reward=flat), method, max_nfe=7 + 54, generator=seeded())
    assert drawn(result) == [7, 11, 11, 11, 11, 10, 1] and result.left == 0


class Staircase:
    """A reward that improves with the call numbers given, and otherwise says 0."""

    def __init__(self, *improve):
        self.improve, self.calls, self.level = improve, 0, 0.0

    def __call__(self, x):
        out = x.new_zeros(len(x))
        for i in range(len(x)):
            if self.calls in self.improve:
                self.level += 1
                out[i] = self.level
            self.calls += 1
        return out


@pytest.mark.parametrize(
    ("rollover", "spend_all", "expected", "left"),
    [
        (True, True, [2, 1, 19, 10, 10, 1], 0),
        (False, True, [2, 1, 10, 10, 10, 1], 9),
        (True, False, [2, 1, 19, 10, 10, 1], 0),
    ],
)
def test_what_a_quota_leaves_rolls_over_to_the_next_transition_only(rollover, spend_all, expected, left):
    """The first candidate is taken at once, no other ever; quota 10."""
    method = RBF(init=2, accept="first", batch=1, rollover=rollover, spend_all=spend_all)
    result = search(problem(5, reward=Staircase(2)), method, max_nfe=42, generator=seeded())
    assert drawn(result) == expected and result.left == left


@pytest.mark.parametrize(("spend_all", "last", "left"), [(True, 37, 0), (False, 1, 36)])
def test_at_the_last_paid_transition_there_is_nothing_to_save_for(spend_all, last, left):
    method = RBF(init=2, accept="first", batch=1, spend_all=spend_all)
    result = search(problem(5, reward=Staircase(2, 3, 4, 5)), method, max_nfe=42, generator=seeded())
    assert drawn(result) == [2, 1, 1, 1, last, 1] and result.left == left


def test_a_speculative_batch_takes_the_first_that_beats_the_record_and_pays_for_all():
    taken = []

    class Ascending(Staircase):
        def __call__(self, x):
            taken.append(x.clone())
            return super().__call__(x)

    # Calls 0, 1 are the initial draws; 4 and 5 improve, the third and fourth of the first batch of six.
    method = RBF(init=2, accept="first", batch=6, spend_all=False)
    result = search(problem(3, reward=Ascending(4, 5)), method, max_nfe=26, generator=seeded())
    assert drawn(result) == [2, 6, 18, 1] and result.trace[1].accepted == 1.0 and result.trace[1].best == 2.0
    assert torch.equal(result.seen, taken[1][3])  # the better one, which the rule passed over, is still reported


def test_best_acceptance_takes_the_best_of_the_whole_quota():
    result = search(problem(), RBF(init=3, accept="best", batch=2), max_nfe=63, generator=seeded())
    assert drawn(result) == [3, 15, 15, 15, 15, 1]
    assert all(step.accepted == step.best for step in result.trace)


def test_the_best_of_enough_is_taken_and_the_rest_rolls_over_to_the_end():
    """500 rows for 5 transitions, 100 each: 24 do, but 452 // 16 of the last three's, 424 // 4 of the last two's."""
    rule = RBF(init=1)
    assert drawn(search(problem(6), rule, max_nfe=501, generator=seeded())) == [1, 24, 24, 28, 106, 318, 1]
    equal = search(problem(6), replace(rule, rollover=False), max_nfe=501, generator=seeded())
    assert drawn(equal) == [1, 100, 100, 100, 100, 100, 1]
    both = search(problem(6), RBF(init=1, chains=2, compete=True), max_nfe=1002, generator=seeded())
    assert drawn(both) == [2, 48, 48, 56, 212, 636, 2]
    few = search(problem(6), replace(rule, enough=7), max_nfe=51, generator=seeded())
    assert drawn(few) == [1, 7, 7, 7, 7, 22, 1]


def test_the_record_is_the_best_accepted_so_far_and_never_falls():
    """Accepted 5, then -1 for want of better: a candidate of 0 beats the parent but not the record."""
    script = {0: 5.0, 1: -1.0, 2: -1.0, 3: 0.0, 4: 0.0}

    class Script:
        calls = 0

        def __call__(self, x):
            self.calls += len(x)
            return x.new_tensor([script.get(self.calls - len(x) + i, 0.0) for i in range(len(x))])

    result = search(
        problem(4, reward=Script()), RBF(init=1, accept="first", batch=1), max_nfe=1 + 6, generator=seeded()
    )
    assert drawn(result) == [1, 2, 2, 2, 1]


def test_chains_are_independent_share_the_budget_and_return_the_best():
    """31 rows for 3 chains: 10, 10 and 11; 2 initial draws each, then 2 paid transitions of 4 (or 5) rows."""
    result = search(problem(3, reward=flat), RBF(init=2, accept="first", chains=3), max_nfe=31, generator=seeded())
    assert drawn(result) == [6, 13, 12, 3] and result.left == 0
    last = []
    result = search(
        problem(3), RBF(init=2, chains=3), max_nfe=31, generator=seeded(), on_step=lambda p, _: last.append(p)
    )
    assert [len(p) for p in last] == [3, 3, 3, 3]
    assert result.reward == last[-1].reward.max() and torch.equal(result.best, last[-1].x[last[-1].reward.argmax()])
    assert [p.parent.tolist() for p in last[1:]] == [[0, 1, 2]] * 3
    assert (last[0].parent // 2).tolist() == [0, 1, 2]  # each chain starts from one of its own two draws


def test_above_select_below_one_is_drawn_and_none_refused():
    """Times 0.8 and 0.6 land above 0.5: one row each; the other 40 - 1 - 2 rows to 0.4 and 0.2."""
    for accept in ("first", "best"):
        method = RBF(init=1, accept=accept, select_below=0.5)
        result = search(problem(reward=flat), method, max_nfe=40, generator=seeded())
        assert drawn(result) == [1, 1, 1, 19, 18, 1] and result.left == 0
    with pytest.raises(ValueError, match="no transition lands"):
        search(problem(velocity=never), RBF(select_below=0.1), max_nfe=40, generator=seeded())


def test_competing_chains_keep_the_best_candidates_whosever_they_are():
    kept, scored = [], []
    method = RBF(init=1, accept="best", chains=3, compete=True)
    judge = lambda x: scored.append(reward(x)) or scored[-1]  # noqa: E731
    result = search(
        problem(3, reward=judge), method, max_nfe=50, generator=seeded(5), on_step=lambda p, _: kept.append(p)
    )
    assert drawn(result) == [3, 24, 21, 3] and result.left == 2
    for candidates, p in zip(scored[1:3], kept[1:3], strict=True):
        assert sorted(p.reward.tolist()) == sorted(candidates.topk(3).values.tolist())
    assert len(set(kept[2].parent.tolist())) == 1  # the children of one state are all that is left


@pytest.mark.parametrize("rest", [{"accept": "first"}, {"accept": "best", "rollover": False}])
def test_chains_that_cannot_compete_are_refused(rest):
    with pytest.raises(ValueError, match="chains compete only"):
        RBF(chains=2, compete=True, **rest)


def test_one_paid_transition_or_none():
    assert drawn(search(problem(2, reward=flat), RBF(init=2, accept="first"), max_nfe=9, generator=seeded())) == [
        2,
        7,
        1,
    ]
    result = search(problem(1, reward=flat), RBF(init=2), max_nfe=9, generator=seeded())
    assert drawn(result) == [2, 1] and result.left == 7


@pytest.mark.parametrize("kernel", [ode, ddim(0.0)], ids=lambda k: k.name)
def test_rbf_refuses_a_deterministic_kernel_before_any_compute(kernel):
    with pytest.raises(ValueError, match="coincide"):
        search(problem(velocity=never, reward=never, kernel=kernel), RBF(), max_nfe=100, generator=seeded())


@pytest.mark.parametrize("cost", [1, 2])
def test_rbf_refuses_a_budget_too_small_before_any_compute(cost):
    with pytest.raises(ValueError, match=f"max_nfe >= {16 * cost}"):
        search(
            problem(velocity=never, reward=never, cost=cost), RBF(chains=2), max_nfe=16 * cost - 1, generator=seeded()
        )


@pytest.mark.parametrize("field", ["init", "batch", "chains"])
def test_rbf_refuses_hyperparameters_out_of_range(field):
    with pytest.raises(ValueError, match=field):
        RBF(**{field: 0})


@pytest.mark.parametrize("rest", [{"accept": "any"}, {"accept": "reserve", "rollover": False}])
def test_rbf_refuses_an_unknown_rule(rest):
    with pytest.raises(ValueError, match="accept"):
        RBF(**rest)


def test_rbf_beats_best_of_n():
    """Gaussian data, reward the first coordinate, 40 runs each: better by more than four standard errors."""
    one = GaussianMixture([[MEAN, MEAN]], STD).velocity(LINEAR)
    setup = problem(10, one, lambda x: x[:, 0], sde(quadratic()))
    rewards = [
        torch.tensor([search(setup, method, max_nfe=100, generator=seeded(i)).reward for i in range(40)])
        for method in (RBF(accept="best"), BestOfN())
    ]
    gain = rewards[0].mean() - rewards[1].mean()
    assert gain > 4 * (rewards[0].var() / 40 + rewards[1].var() / 40).sqrt()


# Our own stopping rule


def test_the_reservation_value_takes_the_quota_on_average_and_gains_more_than_fixed_quotas():
    """Normal draws of known moments: stopping above z spends 1/(1 - Phi(z)) = 20 draws on average, and its mean
    phi(z)/(1 - Phi(z)) = 2.063 exceeds that of the best of 20, 1.867."""
    z = NormalDist().inv_cdf(1 - 1 / 20)
    draws = torch.randn(4000, 400, generator=seeded())
    stop = (draws >= z).int().argmax(1)
    spent, gained = (stop + 1).double(), draws.gather(1, stop[:, None])[:, 0]
    assert spent.mean() == pytest.approx(20, abs=4 * 20 / math.sqrt(4000))
    gain = gained.mean() - draws[:, :20].amax(1).mean()
    assert gain == pytest.approx(2.063 - 1.867, abs=4 * math.sqrt((0.38**2 + 0.53**2) / 4000))


@pytest.mark.parametrize(("top", "stops"), [(1.60, False), (1.70, True)])
def test_a_transition_stops_at_mean_plus_z_deviations(top, stops):
    """For a quota of 20, z = 1.645. The other draws are chosen so that all have mean 0 and standard deviation 1."""
    n = 12
    rest = torch.tensor([1.0, -1.0] * ((n - 2) // 2) + [0.0], dtype=torch.float64)
    a = math.sqrt(((n - 1) - top**2 * (1 + 1 / (n - 1))) / rest.square().sum())
    rewards = torch.cat([torch.tensor([top], dtype=torch.float64), rest * a - top / (n - 1)])
    assert rewards.mean().abs() < 1e-12 and rewards.std() == pytest.approx(1)
    assert reached(rewards, 20) is stops
    assert reached(5 + 3 * rewards, 20) is stops  # in the rewards' own units
    assert not reached(rewards[:3], 20)


def test_reserve_saves_where_a_draw_was_lucky_and_draws_on_where_not():
    """47 rows after one noise, 4 transitions, 4 at a time. Rewards of a transition are flat until the one that ends it:
    the second stops after its first 4; the first never does, and may overdraw by half of the others' quotas."""
    ramp = torch.arange(200.0)  # never a draw far above the mean of all before it... until the transition's cap
    calls = []

    def judge(x):
        calls.append(len(x))
        drawn_ = sum(calls)
        return (ramp[: len(x)] % 2) if drawn_ <= 1 + 30 else x.new_zeros(len(x))

    result = search(problem(5, reward=judge), RBF(init=1, accept="reserve", batch=4), max_nfe=48, generator=seeded())
    rows, most = 47, 47 - (47 * 3 // 4) // 2
    assert drawn(result) == [1, most, 4, 4, rows - most - 8, 1] and result.left == 0


# A threshold by quantile


@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
def test_the_record_by_quantile_is_that_of_the_last_transition(quantile):
    kept, scored = [], []
    judge = lambda x: scored.append(reward(x)) or scored[-1]  # noqa: E731
    method = RBF(init=5, accept="first", batch=3, quantile=quantile)
    watch = lambda p, _: kept.append(p)  # noqa: E731
    search(problem(6, reward=judge), method, max_nfe=60, generator=seeded(2), on_step=watch)
    last, batches = scored[0], iter(scored[1:])
    for step, p in enumerate(kept[1:-2]):
        record, seen = last.quantile(quantile), []
        while not seen or not any((r > record).any() for r in seen):
            seen.append(next(batches))
            if sum(map(len, seen)) >= 60:
                break
        better = seen[-1][seen[-1] > record]
        if len(better):
            assert p.reward == better[0], step
        last = torch.cat(seen)


def test_a_quantile_needs_the_first_improvement_rule():
    with pytest.raises(ValueError, match="quantile"):
        RBF(quantile=0.5)
    with pytest.raises(ValueError, match="quantile"):
        RBF(accept="first", quantile=1.5)


# Guidance, and the settings by name


@pytest.mark.parametrize("chains", [1, 2])
def test_a_guide_is_paid_for_once_a_transition_and_chain(chains):
    velocity = Counting(MIXTURE)
    method = RBF(init=3, chains=chains, guide=Guide(0.5))
    least = chains * (3 + 4 + 3 * 4)  # first noises, one candidate and three units for the gradient a transition
    result = search(problem(velocity=velocity), method, max_nfe=least + 41, generator=seeded())
    assert result.left == 0 and result.gradients == 4 * chains
    assert velocity.rows == result.nfe - 2 * result.gradients  # a gradient's forward is a row, its backward two more
    with pytest.raises(ValueError, match=f"max_nfe >= {least}"):
        search(problem(velocity=never), method, max_nfe=least - 1, generator=seeded())


def test_the_published_settings():
    method = RBF.published()
    assert (method.accept, method.batch, method.chains, method.init, method.spend_all) == ("first", 1, 2, 25, False)


@pytest.mark.parametrize("settings", [RBF.few_step, RBF.multi_step])
@pytest.mark.parametrize("budget", [40, 100, 500])
def test_settings_by_name_fit_their_budget(settings, budget):
    result = search(problem(10), settings(budget), max_nfe=budget, generator=seeded())
    assert result.left < settings(budget).chains


def test_settings_by_name_know_what_an_evaluation_costs_and_how_many_steps_there_are():
    for settings in (RBF.few_step, RBF.multi_step, Refine.few_step):
        assert settings(200, cost=2) == settings(100)
    for steps, budget, cost in ((40, 250, 1), (50, 500, 1), (20, 250, 2)):
        method = RBF.multi_step(budget, steps, cost)
        result = search(problem(steps, cost=cost), method, max_nfe=budget, generator=seeded())
        assert result.left < method.chains * cost

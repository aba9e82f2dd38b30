"""A search that is interrupted, or whose judge or model fails: what was found remains, and it can be gone on with."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import MIXTURE, problem, seeded, wish

from flowscale_lite import RBF, SMC, SVDD, Beam, BestOfN, Draft, Refine, ZeroOrder, search, steps
from flowscale_lite.look_ahead import sibling

METHODS = [RBF(), RBF(2, batch=3, chains=2), SVDD(2, 3), SMC(), Beam(3, 2), Refine(), ZeroOrder(3, init=3), Draft()]
each_method = pytest.mark.parametrize("method", METHODS, ids=repr)
BUDGET = 120


def setup(method, **changes):
    look = {"look_ahead": sibling(lambda x, t: MIXTURE(x, t) / 2)} if isinstance(method, Draft) else {}
    return problem(6, **look | changes)


def begun(method, seed=0, **changes):
    return steps(setup(method, **changes), method, max_nfe=BUDGET, generator=seeded(seed))


class Failing:
    """A function whose call number `at` fails in a way of its own; it counts and remembers what it answered."""

    def __init__(self, function, at, how):
        self.function, self.at, self.how, self.calls, self.said = function, at, how, 0, []

    def __call__(self, *args):
        self.calls += 1
        if self.calls - 1 == self.at:
            if self.how == "nan":
                return self.function(*args) * math.nan
            raise self.how
        self.said += (answer := self.function(*args)).reshape(-1).tolist()
        return answer


FAILURES = [KeyboardInterrupt(), RuntimeError("out of memory"), "nan"]


@each_method
@pytest.mark.parametrize("where", ["reward", "velocity"])
@pytest.mark.parametrize("how", FAILURES, ids=repr)
def test_at_ten_random_points_the_best_so_far_remains_and_the_search_goes_on(method, where, how):
    whole = begun(method)
    list(whole)
    plain = {"reward": wish, "velocity": MIXTURE}[where]
    counted = Failing(plain, None, how)
    list(begun(method, **{where: counted}))
    for at in torch.randint(counted.calls, (10,), generator=seeded(1)).tolist():
        model, judge = Failing(plain, at, how), Failing(wish, None, how)
        judge = model if where == "reward" else judge
        found = begun(method, **{"reward": judge, where: model})
        with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt)):
            list(found)
        if judge.said:
            best = found.so_far()
            assert best.reward == best.seen_reward == pytest.approx(max(judge.said))
            assert float(wish(best.best[None])) == pytest.approx(best.reward)
            assert best.nfe + best.left == BUDGET and best.reward_calls == len(judge.said)
            assert best.trace == tuple(found.trace) and len(best.particles) == 1
        else:
            with pytest.raises(ValueError, match="nothing has been judged"):
                found.so_far()
        state = {name: tensor.clone() for name, tensor in found.state().items()}
        list(found)  # the same search again, from the step that failed
        again = begun(method, seed=9)
        again.restore(state)
        list(again)
        for other in (found, again):
            assert torch.equal(other.result().best, whole.result().best)
            assert torch.equal(other.result().seen, whole.result().seen)
            assert repr(other.trace) == repr(whole.trace)
            told = [replace(x.result(), trace=(), particles=None) for x in (other, whole)]
            assert repr(told[0]) == repr(told[1])


@each_method
def test_a_state_after_every_step_leads_to_the_same_result(method):
    found = begun(method)
    states = [found.state(), *(found.state() for _ in found)]
    for state in states:
        again = begun(method, seed=5)
        again.restore(state)
        list(again)
        assert torch.equal(again.result().best, found.result().best) and repr(again.trace) == repr(found.trace)
        assert again.run.nfe == found.run.nfe and again.run.reward_calls == found.run.reward_calls


def test_whole_numbers_stay_whole():
    found, again = begun(RBF()), begun(RBF())
    next(found)
    again.restore(found.state())
    assert [type(value) for value in again.trace[0]] == [type(value) for value in found.trace[0]]


def test_a_choice_made_between_steps_is_in_the_state():
    found, again = begun(BestOfN(4)), begun(BestOfN(4))
    next(found)
    found.particles = found.particles[2:3]
    again.restore(found.state())
    assert len(again.particles) == 1
    list(found), list(again)
    assert torch.equal(found.result().best, again.result().best)


def test_at_the_end_the_best_so_far_is_the_result():
    found = begun(RBF())
    list(found)
    assert torch.equal(found.so_far().best, found.result().best)
    assert torch.equal(found.result().best, search(setup(RBF()), RBF(), max_nfe=BUDGET, generator=seeded()).best)

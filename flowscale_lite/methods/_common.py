"""What several methods share: their checks, the first noises, the choice of the best."""

from __future__ import annotations

from numbers import Integral

import torch

from ..search import Particles, Problem, Run
from .gradient import Guide


def require_positive(method: object, *names: str) -> None:
    """Raises ValueError if a field so named is no integer of at least 1; None, where it is the default, will do.

    Likewise if the `guide` is no Guide, or if a switch is neither True nor False.
    """
    for name in names:
        value = getattr(method, name)
        if value is None and getattr(type(method), name, 1) is None:  # a number that the budget decides
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")
    for name, value in vars(method).items():
        if name == "guide" and not isinstance(value, Guide | None):
            raise ValueError(f"guide must be a Guide or None; got {value!r}")
        if isinstance(getattr(type(method), name, None), bool) and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False; got {value!r}")


def require_noise(problem: Problem) -> None:
    """Raises ValueError if all candidates from one state coincide."""
    if not problem.kernel.stochastic:
        name = problem.kernel.name
        raise ValueError(f"all candidates coincide under the deterministic kernel {name!r}; use ddim(1.0) or sde(...)")


def require_posterior_mean(problem: Problem) -> None:
    """Raises ValueError if the problem looks ahead at another price than the posterior mean's."""
    if problem.look_ahead.price != 1 or not problem.look_ahead.evaluates:
        raise ValueError(f"this method looks ahead by the posterior mean only; got {problem.look_ahead.name!r}")


def require_budget(problem: Problem, max_nfe: int, evaluations: int, what: str) -> None:
    """Raises ValueError if max_nfe does not pay for the evaluations, which `what` needs."""
    if evaluations * problem.cost > max_nfe:
        raise ValueError(f"{what} need max_nfe >= {evaluations * problem.cost}; got {max_nfe}")


def best_of_each(p: Particles, groups: int) -> Particles:
    """The best row of each of `groups` equal runs of neighbouring rows, such as the children of one parent."""
    size = len(p) // groups
    return p[p.reward.view(groups, size).argmax(1) + size * torch.arange(groups, device=p.x.device)]


def best_noises(run: Run, k: int, init: int) -> Particles:
    """The initial search: k particles of noise, each the best of `init` by look-ahead reward."""
    p = run.start(k * init)
    return p if init == 1 else best_of_each(run.score(p), k)


def evaluations_at_noise(problem: Problem, init: int) -> int:
    """Evaluations of the first noises of one chain, the one kept ready for its first transition."""
    ahead = problem.look_ahead
    return (init * ahead.price if init > 1 else 1) + (0 if ahead.evaluates or init == 1 else 1)


def evaluations_of_chain(problem: Problem, init: int, copies: int = 1) -> int:
    """Evaluations of one chain from its first noises, with `copies` candidates judged at every transition."""
    at_noise, price = evaluations_at_noise(problem, init), problem.look_ahead.price
    kept = max(0, problem.evaluations_kept() - 1)  # the first state kept is among the noises
    return at_noise + kept + copies * price * problem.evaluations_ahead()

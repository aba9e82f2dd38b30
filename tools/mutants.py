"""Planted mistakes: does a test catch each? `make mutants` prints which test caught which, and fails if one survives.

The package and its tests are copied to a temporary folder, one mistake is made there, and the tests named with it run
until the first failure. `tests/test_mutants.py` sees to it that every mistake can still be made in today's sources.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds a run of tests


@dataclass(frozen=True)
class Mutant:
    """A mistake.

    Attributes:
        what: it is, in a few words.
        file: in flowscale_lite/.
        tests: that should catch it, a file's name without test_ and .py, or several.
        old, new: text that stands in the file exactly once, and what the mistake makes of it.
    """

    what: str
    file: str
    tests: str
    old: str
    new: str

    def apply(self, source: str) -> str:
        """The source with the mistake.

        Raises:
            ValueError: the old text does not stand there exactly once, or the new one is the same.
        """
        if source.count(self.old) != 1 or self.old == self.new:
            raise ValueError(
                f"{self.what}: {self.old!r} stands {source.count(self.old)} times in {self.file}, not once"
            )
        return source.replace(self.old, self.new)


M = Mutant
# fmt: off
MUTANTS = (
    # Paths
    M("score of the wrong sign", "interpolants.py", "interpolants",
      "return -self.endpoints(", "return self.endpoints("),
    M("conversion without the scale", "interpolants.py", "references",
      "y = x * (torch.hypot(b, r) / torch.hypot(a, s))", "y = x"),
    M("conversion at an unchanged time", "interpolants.py", "references",
      "u = src.time_of_ratio((s / a).view(-1))", "u = t"),
    M("VP's sigma^2 for its sigma", "interpolants.py", "interpolants",
      "return (-torch.expm1(-integral(t))).sqrt()", "return -torch.expm1(-integral(t))"),
    M("posterior mean read with the sign of v wrong", "interpolants.py", "interpolants",
      "(ds * x - s * v) / det", "(ds * x + s * v) / det"),
    # Kernels
    M("drift without its one half", "kernels.py", "kernels",
      "v - 0.5 * g(t) ** 2 * path.score", "v - g(t) ** 2 * path.score"),
    M("drift with g for g^2", "kernels.py", "kernels",
      "0.5 * g(t) ** 2 * path.score", "0.5 * g(t) * path.score"),
    M("noise by dt for sqrt(dt)", "kernels.py", "kernels",
      "g(t) * math.sqrt(t - s)", "g(t) * (t - s)"),
    M("noise in the last step", "kernels.py", "kernels",
      "if s == 0:", "if s < 0:"),
    M("eta^2 for eta in the noise", "kernels.py", "kernels",
      "* eps, eta * ss *", "* eps, eta**2 * ss *"),
    M("transition that adds noise and takes none away", "kernels.py", "kernels",
      "ss * math.sqrt(1 - eta**2 * (1 - rho**2)) * eps", "ss * eps"),
    M("renoising to too much variance", "kernels.py", "kernels",
      "ss**2 - (b / a * sg) ** 2", "ss**2 - sg**2 / 4"),
    M("renoising with sigma for sigma^2", "kernels.py", "kernels",
      "math.sqrt(max(0.0, ss**2 -", "math.sqrt(max(0.0, ss -"),
    M("VP diffusion without the change of clock", "kernels.py", "kernels",
      "return g(u) * math.sqrt((a * ds - da * s) / (b * dr - db * r))", "return g(u)"),
    # Schedules
    M("the paper's grid without its root", "schedules.py", "schedules",
      "(1 - (1 - t) ** 2).sqrt()", "1 - (1 - t) ** 2"),
    M("the shift the wrong way", "schedules.py", "schedules",
      "t / (t + (1 - t) / shift)", "t / (t + (1 - t) * shift)"),
    M("the default grid's mean in the middle", "schedules.py", "schedules",
      "mean: float = 0.7", "mean: float = 0.0"),
    M("the default grid's deviation", "schedules.py", "schedules",
      "std: float = 0.9", "std: float = 1.0"),
    M("levels down to another", "schedules.py", "schedules",
      "low: float = 0.7)", "low: float = 0.6)"),
    # Resampling
    M("systematic with a uniform of its own a stratum", "resampling.py", "resampling",
      "_uniforms(1, generator, w)", "_uniforms(n, generator, w)"),
    M("residual that draws its rest by the full weights", "resampling.py", "resampling",
      "rest = (n * w - copies).clamp_min(0)", "rest = w"),
    M("effective size without the square", "resampling.py", "resampling",
      "_weights(logw).square().sum()", "_weights(logw).sum()"),
    # The search loop
    M("children of one parent scattered", "search.py", "search",
      ".repeat_interleave(copies)", ".repeat(copies)"),
    M("parents shuffled", "search.py", "search",
      "p.parent[rows]", "p.parent[rows.flip(0)]"),
    M("parents of the step before last", "search.py", "contract",
      "self.method.advance(replace(p, parent=torch.arange(len(p), device=p.x.device)), self.run)",
      "self.method.advance(p, self.run)"),
    M("one noise for all children", "search.py", "search",
      "x + std * self._normal(x.shape)", "x + std * self._normal(x.shape[1:])"),
    M("posterior mean returned as the sample", "search.py", "contract",
      "best=top.x[0]", "best=run.seen[0]"),
    M("a result before the end", "search.py", "search",
      "if self.particles is None or self.particles.t > 0:", "if self.particles is None:"),
    M("so far, from states that are not finished", "search.py", "stopped",
      "if p is None or p.t > 0:", "if p is None:"),
    M("look-ahead at the wrong time", "search.py", "search",
      "self.problem.path.endpoints(x, v, times)[0]", "self.problem.path.endpoints(x, v, 0.9 * times)[0]"),
    M("velocity at the wrong time", "search.py", "look_ahead",
      "v = self._velocity(x, times)", "v = self._velocity(x, 0.9 * times)"),
    M("reward counted once a batch", "search.py", "search",
      "self.reward_calls += len(x0)", "self.reward_calls += 1"),
    M("velocity paid for once a batch", "search.py", "search",
      "self._charge(len(p))\n", "self._charge(1)\n"),
    M("rows that are known paid for again", "search.py", "search",
      "return p.put(new, self.evaluate(p[new]))", "return self.evaluate(replace(p, v=p.v * math.nan))"),
    M("cost of a row forgotten", "search.py", "contract",
      "price = evaluations * self.problem.cost", "price = evaluations"),
    M("budget overspent by one", "search.py", "gradient",
      "if price > self.left:", "if price > self.left + 1:"),
    M("best seen dropped for the last seen", "search.py", "contract",
      "if self.seen is None or float(known[i]) > self.seen[1]:", "if True:"),
    M("start without sigma", "search.py", "search",
      "return self.problem.path.at(self.problem.times[0])[1] * self._normal(", "return self._normal("),
    M("an answer cut off from its gradient taken for one", "search.py", "gradient",
      '("velocity", v if ahead.evaluates else x0)', '("velocity", x0)'),
    # Look-aheads
    M("look-ahead: price forgotten", "search.py", "look_ahead",
      "self._charge(len(p) * (ahead.price - ahead.evaluates))", "pass"),
    M("look-ahead: price of a gradient forgotten", "search.py", "look_ahead",
      "self.problem.gradient_cost * self.problem.look_ahead.price", "self.problem.gradient_cost"),
    M("look-ahead: ode of one evaluation", "look_ahead.py", "look_ahead",
      'LookAhead(f"ode({steps})", steps, estimate', 'LookAhead(f"ode({steps})", 1, estimate'),
    M("look-ahead: ode with one step fewer", "look_ahead.py", "look_ahead",
      "for left in range(steps, 0, -1):", "for left in range(steps, min(steps - 1, 1), -1):"),
    M("look-ahead: ode along the first velocity", "look_ahead.py", "look_ahead",
      "v if left == steps else velocity(x,", "v if left else velocity(x,"),
    M("look-ahead: a sibling that stands for the own velocity", "look_ahead.py", "look_ahead",
      '"sibling", evaluates=False, estimate', '"sibling", evaluates=True, estimate'),
    M("look-ahead: a sibling on the linear path", "look_ahead.py", "look_ahead",
      "return path.endpoints(x, v, times)[0]", "return LINEAR.endpoints(x, v, times)[0]"),
    M("look-ahead: states kept not reserved for", "problem.py", "contract",
      "return 0 if self.look_ahead.evaluates else 1 + self.evaluations_ahead(t)", "return 0"),
    # Methods
    M("chains that pick among one another's children", "methods/_common.py", "methods",
      " + size * torch.arange(groups, device=p.x.device)]", "]"),
    M("the worst initial noise", "methods/_common.py", "methods",
      "best_of_each(run.score(p), k)", "p[:: len(p) // k]"),
    M("CoDe: first noises not paid for", "methods/blockwise.py", "contract",
      "run.evaluate(best_noises(run, self.chains, self.init))", "best_noises(run, self.chains, self.init)"),
    M("paths: the first leg's end not paid for", "methods/search_over_paths.py", "contract",
      "        p = run.evaluate(p)\n", ""),
    M("SMC: weights kept after resampling", "methods/smc.py", "smc",
      "logw=torch.zeros_like(q.logw)", "logw=q.logw"),
    M("SMC: weights dropped without resampling", "methods/smc.py", "smc",
      "logw=p.logw + gain", "logw=gain"),
    M("SMC: full reward for the difference", "methods/smc.py", "smc",
      'gain = f - p.carry["potential"]', "gain = f"),
    M("SMC: tau the wrong way up", "methods/smc.py", "smc",
      "p.reward / self.tau", "p.reward * self.tau"),
    M("SMC: steering not corrected for", "methods/smc.py", "smc",
      "logw=q.logw + log_ratio", "logw=q.logw"),
    M("SMC: constant forgotten at resampling", "methods/smc.py", "smc",
      "torch.full_like(q.logw, log_z(p))", 'q.carry["log_z"]'),
    M("RBF: rollover dropped", "methods/rbf.py", "methods",
      "quota = left - share * (ahead - 1) // run", "quota = share // run"),
    M("RBF: quota over steps, not transitions to pay for", "problem.py", "search",
      "sum(0 < s < start for s in self.times)", "sum(s < start for s in self.times)"),
    M("RBF: the record falls", "methods/rbf.py", "methods",
      "best.reward.clamp_min(record)", "best.reward"),
    M("RBF: a speculative batch takes its best", "methods/rbf.py", "methods",
      "q[taken : taken + 1]", "q.best()"),
    M("RBF: speculation not charged to the quota", "methods/rbf.py", "methods",
      "drawn += len(q)", "drawn += 1"),
    M("RBF: without success the last for the best", "methods/rbf.py", "methods",
      "if best is None or taken is not None or top.reward > best.reward:", "if True:"),
    M("RBF: finish dropped", "methods/rbf.py", "methods",
      "last = self.finish and ahead == 1", "last = False"),
    M("RBF: published without finish", "methods/rbf.py", "methods",
      "rule=FirstImprovement(), chains=chains, batch=batch)",
      "rule=FirstImprovement(), chains=chains, batch=batch, finish=False)"),
    M("RBF: few_step with half of the budget on noises", "methods/rbf.py", "methods",
      "max_nfe // cost // 4", "max_nfe // cost // 2"),
    M("enough: never", "methods/stopping.py", "methods",
      "return min(quota, max(", "return max(quota, max("),
    M("enough: twofold for fourfold", "methods/stopping.py", "methods",
      "left // 4 ** (ahead - 1)", "left // 2 ** (ahead - 1)"),
    M("enough: another number", "methods/stopping.py", "methods",
      "enough: int = 24", "enough: int = 16"),
    M("Beam: select_below ignored", "methods/beam.py", "methods",
      "if s > self.select_below:", "if s > 1:"),
    M("Beam: the first candidates for the best", "methods/beam.py", "methods",
      "return q.top(kept)", "return q[:kept]"),
    M("Beam: never narrower", "methods/beam.py", "methods",
      "self.states ** ((ahead - 1) / run.problem.evaluations_ahead())", "self.states"),
    M("Beam: reserves for states it dropped", "methods/beam.py", "contract",
      "left = run.evaluations_left - kept * (", "left = run.evaluations_left - self.states * ("),
    M("Beam: multi_step that selects from the start", "methods/beam.py", "methods",
      "select_below=0.8)", "select_below=1.0)"),
    M("zero-order: noises that grow", "methods/zero_order.py", "methods",
      "math.sqrt(1 - self.radius**2) * carry", "carry"),
    M("Refine: the regions kept are those redrawn", "beyond/refine.py", "methods",
      "torch.where(where, run.noise(n) / start, noise_in(p, run))",
      "torch.where(where, noise_in(p, run), run.noise(n) / start)"),
    M("Refine: the last try kept, better or not", "beyond/refine.py", "methods",
      "return q if q.reward > p.reward else p", "return q"),
    M("Refine: scattered entries for regions", "beyond/refine.py", "methods",
      "* parts // side)", "% parts)"),
    M("Draft: the worst drafts finished", "beyond/draft.py", "draft",
      "return pool.top(min(kept, len(pool)))", "return pool[-min(kept, len(pool)):]"),
    M("Draft: tries from any draft", "beyond/draft.py", "draft",
      "redrawn(p.best(), run, n, p.t", "redrawn(p[-1:], run, n, p.t"),
    M("Draft: all drafted with the model's own look-ahead", "beyond/draft.py", "draft",
      "if problem.look_ahead.evaluates:", "if False:"),
    M("Cascade: the model never redraws", "beyond/draft.py", "draft",
      "renoised(p, run, noise_in(p, run), level)", "renoised(p, run, noise_in(p, run), p.t)"),
    M("Cascade: the model's tries judged by the sibling", "beyond/draft.py", "draft",
      "self.share, self.cells), ahead).best()", "self.share, self.cells)).best()"),
    M("Cascade: the sibling's picture returned", "beyond/draft.py", "draft",
      "drawn = renoised(p", "return run.place(p, p.x0, 0.0)\n                drawn = renoised(p"),
    # The small world
    M("a relation by any distance", "tiny/counter.py", "shapes",
      "(gaps >= MARGIN).all()", "(gaps > 0).all()"),
    M("a reward that knows another relation", "tiny/counter.py", "shapes",
      "np.clip(MARGIN - gaps, 0, 1)", "np.clip(0.3 - gaps, 0, 1)"),
    # Oracles
    M("mixture with sigma for sigma^2", "tiny/toys.py", "toys",
      "(a * self.scales.to(x.device)) ** 2 + s**2", "(a * self.scales.to(x.device)) ** 2 + s"),
    M("tilted mixture with the weights of the old", "tiny/toys.py", "toys",
      "log_w = self.weights.log() + log_z", "log_w = self.weights.log() + 0 * log_z"),
    M("distilled flow by Euler's rule", "tiny/toys.py", "toys",
      "y = y - h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)", "y = y - h * k1"),
)
# fmt: on


class Outcome(NamedTuple):
    """caught: whether a test failed; by: the first one that did; seconds: it took."""

    caught: bool
    by: str
    seconds: float


def try_out(mutant: Mutant | None, tests: Sequence[str]) -> Outcome:
    """Runs test files on a copy of the sources with the mistake, or with none.

    Raises:
        RuntimeError: the tests did not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in ("flowscale_lite", "tests"):
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / "data").symlink_to(ROOT / "data")  # which no test changes
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutant is not None:
            path = Path(folder) / "flowscale_lite" / mutant.file
            path.write_text(mutant.apply(path.read_text(encoding="utf-8")), encoding="utf-8")
        quiet = ("-x", "-q", "--tb=no", "-p", "no:cacheprovider")
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *quiet, *(f"tests/test_{name}.py" for name in tests)],
            cwd=folder, env={**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True, text=True, timeout=LIMIT,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    failed = re.search(r"^FAILED tests/(.+?)(?: - |$)", done.stdout, re.M)
    if done.returncode not in (0, 1) or (done.returncode == 1) != bool(failed):
        raise RuntimeError(f"the tests did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return Outcome(bool(failed), failed[1] if failed else "", seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description="Plants mistakes and reports which test catches which.")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--only", default="", help="those whose description or file holds this text")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if args.only in m.what or args.only in m.file]
    width = max(len(m.what) for m in chosen)
    caught = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, outcome in zip(chosen, pool.map(lambda m: try_out(m, m.tests.split()), chosen), strict=True):
            caught += outcome.caught
            print(f"{mutant.what:{width}}  {outcome.by or 'SURVIVED'}  ({outcome.seconds:.0f} s)", flush=True)
        every = sorted({name for m in chosen for name in m.tests.split()})
        sound = pool.map(lambda name: try_out(None, [name]), every)  # what fails anyway would catch everything
        if broken := [outcome.by for outcome in sound if outcome.caught]:
            print("These fail without any mistake, so nothing above counts:", *broken)
            return 1
    print(f"{caught} of {len(chosen)} mistakes caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())

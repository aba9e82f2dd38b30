"""Sweeps lose and repeat nothing, whatever is killed; comparisons pair what belongs together; intervals cover."""

import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from flowscale_lite import LINEAR, RBF, GaussianMixture, Problem, QuadraticReward, ddim, experiments, search, uniform

HERE = Path(__file__).parent
STORED = HERE.parent / "data/results/paper.jsonl"
TASKS = [{"prompt": p, "seed": s} for p in ("a", "b", "c") for s in range(4)]


def square(task):
    return {"value": task["seed"] ** 2}


def rows_of(path):
    """The file as it is, every line whole."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def ordered(rows):
    return sorted(rows, key=json.dumps)


# ------------------------------------------------------------------------------------------------------------ sweeps
def test_rows_come_in_task_order_and_are_not_run_twice(tmp_path):
    path, calls = tmp_path / "deep" / "rows.jsonl", []
    rows = experiments.sweep(TASKS[:5], lambda t: calls.append(t) or square(t), path)
    assert rows == [t | square(t) for t in TASKS[:5]] and len(calls) == 5
    again = experiments.sweep(TASKS[::-1], lambda t: calls.append(t) or square(t), path)
    assert again == [t | square(t) for t in TASKS[::-1]] and len(calls) == len(TASKS)
    assert ordered(experiments.read(path)) == ordered(again)
    assert experiments.sweep([], square, tmp_path / "none.jsonl", workers=2) == []


@pytest.mark.parametrize("cut", [1, 9, 60])
def test_a_line_cut_short_is_done_again(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    experiments.sweep(TASKS[:3], square, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    left = len(experiments.read(path))
    assert left == {1: 3, 9: 2, 60: 1}[cut]  # a line that lacks no more than its end is whole
    calls = []
    rows = experiments.sweep(TASKS[:3], lambda t: calls.append(t) or square(t), path)
    assert rows == [t | square(t) for t in TASKS[:3]]
    assert len(calls) == 3 - left and path.read_bytes() == whole


def test_a_row_is_on_the_disk_before_the_next_run_starts(tmp_path):
    path, seen = tmp_path / "rows.jsonl", []

    def run(task):
        seen.append(len(rows_of(path)))
        return {"value": 0}

    experiments.sweep(TASKS[:4], run, path)
    assert seen == [0, 1, 2, 3]


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_lost(tmp_path):
    path = tmp_path / "rows.jsonl"
    text = '{"prompt": "a", "seed": 0, "value": 0}\n{"prompt": \n{"prompt": "a", "seed": 2, "value": 4}\n'
    path.write_text(text)
    with pytest.raises(ValueError, match="line 2 is no JSON object"):
        experiments.sweep(TASKS[:3], square, path)
    assert path.read_text() == text


@pytest.mark.parametrize("text", ['{"made": "elsewhere"}', "notes\nof mine", '{"prompt": "x", "seed": 0}\nnotes'])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"another sweep|no JSON object|no row"):
        experiments.sweep(TASKS[:3], square, path)
    assert path.read_text().rstrip("\n") == text


def test_a_row_is_the_same_when_it_is_read_again(tmp_path):
    path, found = tmp_path / "rows.jsonl", {"pair": (1, 2), "by": {1: 2}}
    assert experiments.sweep(TASKS[:1], lambda _: found, path) == experiments.sweep(TASKS[:1], square, path)


def test_two_sweeps_do_not_write_one_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    experiments.sweep(TASKS[:1], square, path)
    with path.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another sweep is writing"):
            experiments.sweep(TASKS, square, path)
    assert len(experiments.sweep(TASKS, square, path)) == len(TASKS)


def test_a_run_that_fails_is_tried_again_and_then_reported_when_the_others_are_done(tmp_path):
    path, calls = tmp_path / "rows.jsonl", []

    def run(task):
        calls.append(task["seed"])
        if task["seed"] == 1 or (task["seed"] == 2 and calls.count(2) == 1):
            raise RuntimeError(f"out of luck with {task['seed']}")
        return {"value": [1, 2]} if task["seed"] == 3 else {"value": torch.ones(1)} if task["seed"] == 0 else {}

    with pytest.raises(ExceptionGroup, match="2 of 4 runs failed in each of 2 tries") as info:
        experiments.sweep(TASKS[:4], run, path)
    assert calls == [0, 1, 2, 3, 0, 1, 2]
    assert ordered(rows_of(path)) == ordered([TASKS[2], TASKS[3] | {"value": [1, 2]}])
    assert [(str(error), *error.__notes__) for error in info.value.exceptions] == [
        ("Object of type Tensor is not JSON serializable", f"This was the run of {TASKS[0]}."),
        ("out of luck with 1", f"This was the run of {TASKS[1]}."),
    ]
    assert "Tensor is not JSON serializable" in str(info.value)  # the first is told where only the message is shown
    calls.clear()
    experiments.sweep(TASKS[:4], lambda t: calls.append(t["seed"]) or {}, path)
    assert calls == [0, 1]


def test_bad_sweeps_are_refused_before_anything_runs(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"

    def never(task):
        raise AssertionError("ran")

    for tasks, options, message in (
        ([TASKS[0], TASKS[0]], {}, "twice"),
        ([TASKS[0], {"prompt": "a"}], {}, "same fields"),
        (TASKS, {"workers": 0}, "workers must be at least 1"),
        (TASKS, {"retries": -1}, "retries must be at least 0"),
        (TASKS, {"engine": "http"}, "engine must be"),
        (TASKS, {"resources": {"num_gpus": 1}}, "resources are what Ray"),
    ):
        with pytest.raises(ValueError, match=message):
            experiments.sweep(tasks, never, path, **options)
    assert not path.exists()
    with pytest.raises(ExceptionGroup, match="must not use its task's names; it found \\['seed'\\]"):
        experiments.sweep(TASKS[:1], lambda t: {"seed": 7}, path)
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    monkeypatch.setattr(never, "__module__", "__main__")
    for run in (never, functools.partial(never)):
        with pytest.raises(ValueError, match="defined in a notebook"):
            experiments.sweep(TASKS, run, path, workers=2)
    experiments.sweep([{"other": 1}], lambda t: {}, path)
    with pytest.raises(ValueError, match="rows of another sweep"):
        experiments.sweep(TASKS, never, path)
    more = tmp_path / "more.jsonl"
    experiments.sweep([TASKS[0] | {"budget": budget} for budget in (1, 2)], square, more)
    with pytest.raises(ValueError, match="of more fields"):
        experiments.sweep(TASKS, never, more)


# --------------------------------------------------------------------------------------------- processes that die
def once(task):
    """Whether this is the first time that `task` is tried; known across processes."""
    try:
        (Path(task["folder"]) / f"tried-{task['seed']}").open("x")
    except FileExistsError:
        return False
    return True


def perilous(task):
    """Seed 2 is killed at its first try, seed 5 at every one, seed 7 raises at every one."""
    if task["seed"] == 5 or (task["seed"] == 2 and once(task)):
        os.kill(os.getpid(), signal.SIGKILL)
    if task["seed"] == 7:
        raise RuntimeError("no luck")
    return {"value": task["seed"] ** 2}


def test_workers_that_die_cost_only_the_run_they_died_of(tmp_path):
    tasks = [{"seed": s, "folder": str(tmp_path)} for s in range(9)]
    with pytest.raises(ExceptionGroup, match="2 of 9 runs") as info:
        experiments.sweep(tasks, perilous, tmp_path / "rows.jsonl", workers=2)
    failed = {error.__notes__[-1]: str(error) for error in info.value.exceptions}
    assert failed.keys() == {f"This was the run of {tasks[seed]}." for seed in (5, 7)}
    assert "terminated abruptly" in failed[f"This was the run of {tasks[5]}."]
    assert "no luck" in failed[f"This was the run of {tasks[7]}."]
    expected = [t | {"value": t["seed"] ** 2} for t in tasks if t["seed"] not in (5, 7)]
    assert ordered(rows_of(tmp_path / "rows.jsonl")) == ordered(expected)


SLOW = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from flowscale_lite import experiments
def run(task):
    time.sleep(0.05)
    return {"value": task["seed"] ** 2, "worker": os.getpid()}
if __name__ == "__main__":
    experiments.sweep([{"seed": s} for s in range(60)], run, Path(sys.argv[1]), workers=2)
    assert not {"ray", "transformers", "diffusers"} & set(sys.modules)
"""


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_without_loss_and_leaves_no_worker_behind(tmp_path):
    script, path = tmp_path / "slow.py", tmp_path / "rows.jsonl"
    script.write_text(SLOW)
    command = [sys.executable, str(script), str(path), str(HERE.parent)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not path.exists() or len({row["worker"] for row in experiments.read(path)}) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = experiments.read(path)
    assert 2 <= len(before) < 60
    deadline = time.monotonic() + 20
    while any(alive(row["worker"]) for row in before):
        assert time.monotonic() < deadline, "workers outlive the sweep they worked for"
        time.sleep(0.05)
    subprocess.run(command, check=True)
    rows = rows_of(path)
    assert rows[: len(before)] == before and sorted(row["seed"] for row in rows) == list(range(60))
    assert all(row["value"] == row["seed"] ** 2 for row in rows)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split() if Path("/proc/self").exists() else True


# --------------------------------------------------------------------------------------------------------------- Ray
RING = GaussianMixture.ring()


def plain_search(task, judge=None):
    """A search on the series' toy; with `judge`, its reward is asked for elsewhere."""
    reward = judge or QuadraticReward((2.4, 0.0))
    problem = Problem(RING.velocity(LINEAR), reward, LINEAR, ddim(), uniform(5), (2,))
    generator = torch.Generator().manual_seed(task["seed"])
    result = search(problem, RBF(init=4), max_nfe=task["budget"], generator=generator)
    return {"reward": result.reward, "nfe": result.nfe}


def perilous_search(task, folder, judge):
    if task["seed"] == 3 and once(task | {"folder": folder}):
        os.kill(os.getpid(), signal.SIGKILL)
    if task["seed"] == 99:
        raise RuntimeError("no luck")
    return plain_search(task, judge) | {"worker": os.getpid(), "judge": int(judge(torch.zeros(1, 2), "pid"))}


class Elsewhere:
    """A judge that can tell which process it lives in, and dies once."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, x, ask=""):
        if ask == "pid":
            return torch.tensor([os.getpid()])
        if once({"folder": self.folder, "seed": "judge"}):
            os.kill(os.getpid(), signal.SIGKILL)
        return QuadraticReward((2.4, 0.0))(x)


SEARCHES = [{"budget": b, "seed": s} for b in (20, 40) for s in range(6)]


def on_ray(folder):
    """Run by the test below in a process of its own: what a sweep on two Ray workers comes to."""
    path, failures, refusal = Path(folder) / "rows.jsonl", [], ""
    judge = experiments.serve(functools.partial(Elsewhere, folder))
    run = functools.partial(perilous_search, folder=folder, judge=judge)
    try:
        experiments.sweep([*SEARCHES, {"budget": 20, "seed": 99}], run, path, workers=2, engine="ray")
    except ExceptionGroup as group:
        failures = [(str(error).strip().splitlines()[-1], error.__notes__) for error in group.exceptions]
    try:
        experiments.sweep(SEARCHES, run, Path(folder) / "none", engine="ray", resources={"num_gpus": 1e3})
    except ValueError as error:
        refusal = str(error)
    said = {"failures": failures, "refusal": refusal, "driver": os.getpid()}
    (Path(folder) / "said.json").write_text(json.dumps(said))


@pytest.mark.slow
def test_ray_workers_killed_and_resumed_give_what_the_local_run_gives(tmp_path):
    """Two workers and a judge on a cluster of this machine; the file was begun by a local run, one worker and the judge
    are killed with SIGKILL in the middle, one run always raises."""
    pytest.importorskip("ray")
    path = tmp_path / "rows.jsonl"
    begun = experiments.sweep(SEARCHES[:3], plain_search, path)
    code = "import sys; sys.path[:0] = sys.argv[2:]; import test_experiments; test_experiments.on_ray(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path), str(HERE), str(HERE.parent)]
    environment = os.environ | {
        "PYTHONPATH": f"{HERE}:{HERE.parent}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_agent_register_timeout_ms": "29000",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if "timed out during startup" in done.stderr:
        pytest.skip("this machine is so busy that Ray, which waits half a minute for itself, gave up starting")
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["failures"] == [["RuntimeError: no luck", ["This was the run of {'budget': 20, 'seed': 99}."]]]
    assert "GPU" in said["refusal"]
    rows = rows_of(path)
    assert rows[:3] == begun and len(rows) == len(SEARCHES)
    assert (tmp_path / "tried-3").exists() and (tmp_path / "tried-judge").exists()
    workers, judges = ({row[name] for row in rows[3:]} for name in ("worker", "judge"))
    assert len(workers) >= 2 and len(judges) >= 1 and said["driver"] not in workers | judges and not workers & judges
    local = experiments.sweep(SEARCHES, plain_search, tmp_path / "local.jsonl")
    names = ("budget", "seed", "reward", "nfe")
    assert ordered([{n: row[n] for n in names} for row in rows]) == ordered(
        [{n: row[n] for n in names} for row in local]
    )
    assert experiments.sweep(SEARCHES, plain_search, path) and rows_of(path) == rows  # the local run has nothing to add


def test_without_ray_the_reason_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="extra `scale`"):
        experiments.sweep(TASKS, square, tmp_path / "rows.jsonl", engine="ray")
    with pytest.raises(ImportError, match="extra `scale`"):
        experiments.serve(square)


# ----------------------------------------------------------------------------------------------------------- reading
def test_clustered_interval_covers_and_is_wider_than_a_naive_one():
    """40 prompts with effects of their own, 3 seeds each: 95 % intervals hold the true mean about 95 times of 100."""
    rng, clusters = np.random.default_rng(0), np.repeat(np.arange(40), 3)
    covered, widths = [], []
    for trial in range(200):
        values = rng.normal(0, 1, 40)[clusters] + rng.normal(0, 0.3, 120)
        interval = experiments.clustered_mean(values, clusters, seed=trial, resamples=500)
        covered.append(interval.low <= 0 <= interval.high)
        widths.append(interval.high - interval.low)
    naive = 2 * 1.96 * np.sqrt((1 + 0.09) / 120)
    assert 0.88 <= np.mean(covered) <= 0.99  # binomial, 200 tries of 0.94: standard error 0.017
    assert np.mean(widths) > 1.4 * naive


@pytest.mark.parametrize("value", [True, False])
def test_truth_values_that_all_agree_are_not_certain(value):
    """50 of 50, in 50 clusters or in 10 of five: the interval is the binomial's, of as many trials as clusters."""
    for n in (50, 10, 1):
        interval = experiments.clustered_mean([value] * 50, [i % n for i in range(50)])
        edge = 1 - 0.025 ** (1 / n)  # where n of n, or none, are just 2.5 % likely: Clopper and Pearson's bound
        assert [*interval] == pytest.approx([1, 1 - edge, 1] if value else [0, 0, edge])
    assert [*experiments.clustered_mean([0.0] * 50, range(50))] == [0, 0, 0]  # of numbers nothing is known
    assert experiments.clustered_mean([True, False] * 25, range(50)).low > 0.3


def results(effect, rng_seed=0):
    """Two methods on 30 prompts of very different difficulty, 3 seeds: the second is `effect` better on the average."""
    rng = np.random.default_rng(rng_seed)
    hard, luck = rng.normal(0, 3, 30), rng.normal(0, 1, (30, 3))
    gain = effect + rng.normal(0, 0.2, 30)[:, None] + rng.normal(0, 0.3, (30, 3))
    shift = {"old": np.zeros((30, 3)), "new": gain}
    return [
        {"method": m, "prompt": f"p{p}", "seed": s, "score": hard[p] + luck[p, s] + shift[m][p, s], "nfe": 100 + s}
        for m in ("new", "old")
        for p in range(30)
        for s in range(3)
    ], gain


def by_hand(values, clusters):
    """The interval by its definition, without scipy: draw clusters, divide the sum of values by their number."""
    groups = [[v for v, c in zip(values, clusters, strict=True) if c == name] for name in sorted(set(clusters))]
    sums, sizes = np.array([sum(group) for group in groups]), np.array([len(group) for group in groups])
    draws = np.random.default_rng(0).integers(len(groups), size=(4000, len(groups)))
    return [np.mean(values), *np.quantile(sums[draws].sum(1) / sizes[draws].sum(1), [0.025, 0.975])]


def test_intervals_are_those_of_the_bootstrap_by_hand():
    """On stored runs, of methods with different numbers of runs; and of prompts with different numbers of them."""
    rows = [row for row in experiments.read(STORED) if row["sampler"] == "VP-SDE"]
    table = experiments.table(pd.DataFrame(rows), ["method"], ["given", "nfe"])
    assert len(table) > 5 and len(set(table["runs"])) > 1
    for method, line in table.iterrows():
        cell = [row for row in rows if row["method"] == method]
        assert line["runs"] == len(cell)
        for name in ("given", "nfe"):
            expected = by_hand([float(row[name]) for row in cell], [row["prompt"] for row in cell])
            assert [*line[name]] == pytest.approx(expected, abs=1e-12)
    uneven = experiments.clustered_mean([1.0, 2.0, 5.0, 0.5], ["a", "a", "b", "c"])
    assert [*uneven] == pytest.approx(by_hand([1.0, 2.0, 5.0, 0.5], ["a", "a", "b", "c"]), abs=1e-12)


def test_table_groups_rows_and_shows_intervals():
    rows, _ = results(0.3)
    lines = experiments.table(rows, ["method"], ["score", "nfe"])
    assert list(lines.index) == ["new", "old"] and list(lines["runs"]) == [90, 90]
    old = rows[90:]
    assert lines.loc["old", "score"] == experiments.clustered_mean(
        [r["score"] for r in old], [r["prompt"] for r in old]
    )
    assert [mean for mean, _, _ in lines["nfe"]] == [101, 101]
    assert "101.00 [101.00, 101.00]" in lines.to_html() and "101.00 [101.00, 101.00]" in lines.to_string()
    assert list(experiments.table(rows, ["method", "seed"], ["score"]).index.get_level_values("seed")) == [0, 1, 2] * 2
    with pytest.raises(ValueError, match="no field 'rss'"):
        experiments.table(rows, ["method"], ["rss"])
    with pytest.raises(ValueError, match="no field 'score'"):
        experiments.table([*rows, {"method": "new", "prompt": "p0"}], ["method"], ["score"])
    with pytest.raises(ValueError, match="no rows"):
        experiments.table([], ["method"], ["score"])


def test_paired_difference_is_the_mean_gain_whatever_the_order_of_rows():
    rows, gain = results(0.3)
    new, old = rows[:90], rows[90:]
    interval = experiments.paired_difference(new, old[::-1], "score")
    gains = [a["score"] - b["score"] for a, b in zip(new, old, strict=True)]
    assert [*interval] == pytest.approx(by_hand(gains, [row["prompt"] for row in new]))
    assert interval.mean == pytest.approx(gain.mean())
    for line in experiments.table(rows, ["method"], ["score"])["score"]:
        assert line.high - line.low > 5 * (interval.high - interval.low)


def test_rows_that_do_not_pair_are_refused():
    rows, _ = results(0.3)
    new, old = rows[:90], rows[90:]
    with pytest.raises(ValueError, match="1 rows have no partner"):
        experiments.paired_difference(new[1:], old, "score")
    with pytest.raises(ValueError, match="two rows of one side agree"):
        experiments.paired_difference(new, old, "score", by=("prompt",))
    with pytest.raises(ValueError, match="two rows of one side agree"):
        experiments.paired_difference([*new, new[0]], old, "score")

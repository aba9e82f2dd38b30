"""The bench: a method from a file beside stored rows, twice the same; a failing one gets one line and no row."""

import json
from pathlib import Path

import pytest

from flowscale_lite import BestOfN, cli, look_ahead
from flowscale_lite.experiments import bench, paper, read

ROOT = Path(__file__).parents[1]
TAUGHT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```python\n", 2)[1].split("```")[0]


@pytest.fixture
def one_prompt(monkeypatch):
    """The quick bench of a prompt, beside a stored row that no real one is better than."""
    everything = bench.tasks
    monkeypatch.setattr(bench, "tasks", lambda *args: everything(*args)[:2])
    rows = [t | bench.run(t) for t in bench.tasks("few-step", ["best-of-n"], [100], 1, (0, 1))]
    monkeypatch.setattr(bench, "read", lambda path: [row | {"exact": True} for row in rows])
    return rows


def of(tmp_path: Path, code: str) -> str:
    (tmp_path / "mine.py").write_text(code)
    return f"{tmp_path / 'mine.py'}:"


def test_the_method_that_contributing_teaches_runs_twice_the_same(tmp_path, one_prompt, capsys):
    name, found = of(tmp_path, TAUGHT) + "Halving", []
    for out in ("a.jsonl", "b.jsonl"):
        cli.main(["bench", "few-step", name, "--quick", "--out", str(tmp_path / out)])
        assert "worse" in capsys.readouterr().out or read(tmp_path / out)[0]["exact"]
        found.append([row | {"seconds": 0} for row in read(tmp_path / out)])
    assert found[0] == found[1] and found[0][0]["nfe"] <= 100
    cli.main(["bench", "few-step", name, "--quick", "--out", str(tmp_path / "a.jsonl")])  # all there: nothing is run
    assert len(read(tmp_path / "a.jsonl")) == len(found[0])


def test_stopped_it_goes_on_where_it_was(tmp_path, one_prompt, monkeypatch):
    """The row that was there is neither lost nor made again."""
    made, run, out = [], bench.run, tmp_path / "out.jsonl"

    def until(stop):
        def one(task, **options):
            if len(made) == stop:
                raise KeyboardInterrupt
            made.append(task["seed"])
            return run(task, **options)

        monkeypatch.setattr(bench, "run", one)
        cli.main(["bench", "few-step", of(tmp_path, TAUGHT) + "Halving", "--quick", "--out", str(out)])

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        until(1)
    (first,) = read(out)
    until(None)
    assert made == [row["seed"] for row in read(out)] and len(made) == 2 and read(out)[0] == first


@pytest.mark.parametrize(
    ("advance", "says"),
    [
        ("raise RuntimeError('no idea')", "RuntimeError: no idea"),
        ("return run.propose(run.score(p), 1000)", "BudgetExceeded"),
        ("return run.place(p, p.x * float('nan'), 0.0)", "finite"),
    ],
)
def test_a_method_that_fails_gets_one_line_and_no_row(tmp_path, one_prompt, capsys, advance, says):
    code = TAUGHT.replace("return run.propose(run.score(p).top(max(1, len(p) // 2)))", advance)
    assert code != TAUGHT
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "few-step", of(tmp_path, code) + "Halving", "--quick", "--out", str(tmp_path / "out.jsonl")])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flowscale")]
    assert stop.value.code == 1 and len(lines) == 1 and says in lines[0] and read(tmp_path / "out.jsonl") == []


@pytest.mark.parametrize(
    ("name", "says"),
    [("nothing.py:Mine", "existing file"), ("Mine", "existing file"), ("{}Nobody", "no method, class or function")],
)
def test_what_cannot_be_run_is_refused_in_a_line(tmp_path, capsys, name, says):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "few-step", name.format(of(tmp_path, TAUGHT)), "--out", str(tmp_path / "out.jsonl")])
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_a_function_of_the_budget_and_a_sampler_of_ones_own(tmp_path):
    code = "from flowscale_lite import BestOfN\nfrom flowscale_lite.experiments.paper import SAMPLERS\n"
    code += "SAMPLER, SIBLING = SAMPLERS['ODE'], True\ndef mine(nfe):\n    return BestOfN(nfe // 20)\n"
    code += "from flowscale_lite import RBF\nfew = RBF.few_step\n"
    entry, digest = bench.imported(of(tmp_path, code) + "mine")
    assert entry.method(100) == BestOfN(5) and entry.sampler == paper.SAMPLERS["ODE"] and len(digest) == 12
    assert entry.look_ahead == look_ahead.posterior_mean
    code += "from flowscale_lite import look_ahead\nLOOK_AHEAD = look_ahead.ode(5)\n"
    assert bench.imported(of(tmp_path, code) + "few")[0].look_ahead.price == 5
    assert entry.sibling and bench.imported(of(tmp_path, code) + "few")[0].method(100).init == 25


def test_a_dataclass_whose_annotations_are_text(tmp_path):
    """Its module must be there when the file is run: dataclasses look it up."""
    entry, _ = bench.imported(of(tmp_path, "from __future__ import annotations\n" + TAUGHT) + "Halving")
    task = {"track": "few-step", "method": "mine", "budget": 50, "prompt": "two red circles", "seed": 0}
    assert bench.run(task, entry)["nfe"] <= 50


def test_stored_rows_replay():
    """The first of each track, to the digits that another processor keeps."""
    rows = [json.loads(line) for line in (ROOT / "data/results/bench.jsonl").read_text().splitlines()]
    assert {row["track"] for row in rows} <= set(bench.TRACKS)
    first = {row["method"]: row for row in reversed(rows) if row["budget"] == 100}
    for row in first.values():
        again = bench.run({name: row[name] for name in ("track", "method", "budget", "prompt", "seed")})
        assert (again["nfe"], again["reward_calls"]) == (row["nfe"], row["reward_calls"])
        assert again["given"] == pytest.approx(row["given"], abs=0.05)


def test_nothing_is_tuned_on_the_test_list():
    """Two tools name it, the paper's table and the defaults chosen on the tune list; bench and variety report on it."""
    for name, expected in {"test": ["defaults.py", "paper.py"], "compose": []}.items():
        tools = sorted((ROOT / "tools").rglob("*.py"))
        assert [p.name for p in tools if f"prompts/{name}.txt" in p.read_text()] == expected

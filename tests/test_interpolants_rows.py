"""The stored rows of notebook 05: all there, and what `tools.runs.interpolants` makes today."""

import json

import pytest

from flowscale_lite import experiments
from tools.runs import interpolants


@pytest.mark.parametrize(
    ("path", "number", "models"),
    [(interpolants.VARIETY, 20, ("dev", "schnell")), (interpolants.SEARCHES, 40, ("schnell",))],
)
def test_every_task_has_its_row_and_no_other(path, number, models):
    rows, tasks = experiments.read(path), interpolants.tasks(number, *models)
    kept = [{field: row[field] for field in tasks[0]} for row in rows]
    assert sorted(kept, key=json.dumps) == sorted(tasks, key=json.dumps)


@pytest.mark.parametrize("sampler", ["+ diffusion", "DDPM transition + grid", "VP-SDE, on VP itself"])
@pytest.mark.parametrize(
    ("path", "run", "model"),
    [(interpolants.VARIETY, interpolants.variety, "dev"), (interpolants.SEARCHES, interpolants.searched, "schnell")],
)
def test_a_stored_row_is_found_again(path, run, model, sampler):
    task = {"model": model, "sampler": sampler, "prompt": interpolants.texts(3)[2]}
    (row,) = (row for row in experiments.read(path) if task.items() <= row.items())
    # rows are rounded, and the last digits of a float differ between machines
    assert run(task) == pytest.approx({name: row[name] for name in row if name not in task}, rel=0.02, abs=0.02)

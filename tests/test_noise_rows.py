"""The stored rows of notebook 04: all there, and what `tools.runs.noise` makes today."""

import json
from pathlib import Path

from flowscale_lite import experiments
from tools.runs import noise


def test_every_task_has_its_row_and_no_other():
    rows, tasks = experiments.read(noise.PATH), noise.tasks()
    kept = [{field: row[field] for field in tasks[0]} for row in rows]
    assert sorted(kept, key=json.dumps) == sorted(tasks, key=json.dumps)
    assert all(len(row[judge]) == len(noise.SAMPLERS) for row in rows for judge in ("exact", "held_out"))


def test_stored_rows_are_found_again():
    tasks = [task for task in noise.tasks() if task["steps"] == 4][90:96]
    rows = [next(row for row in experiments.read(noise.PATH) if task.items() <= row.items()) for task in tasks]
    agree = [
        now == stored
        for task, row in zip(tasks, rows, strict=True)
        for judge, verdicts in noise.run(task).items()
        for now, stored in zip(verdicts, row[judge], strict=True)
    ]
    assert (
        len(agree) == 36 and sum(agree) >= 34
    )  # the last digits of a float, and so a close verdict, differ by machine


def test_notebook_04_reads_them_in_the_order_in_which_they_are_stored():
    source = (Path(__file__).parents[1] / "notebooks/src/04_ode_to_sde.py").read_text()
    assert f'"{noise.PATH.name}"' in source
    assert f"SAMPLERS = {json.dumps(list(noise.SAMPLERS))}" in source

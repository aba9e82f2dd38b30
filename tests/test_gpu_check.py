"""The check for a GPU, rehearsed on a CPU: it runs to its end, and what fails takes nothing else down."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowscale_lite.flux import cost
from tools.runs import gpu_check
from tools.runs.gpu_check import Machine, known_gpu

TINY = Machine(cuda=False, tiny=True)


def rows(name: str, machine: Machine = TINY) -> list[dict]:
    return list(gpu_check.rows_of(name, machine, math.inf))


@pytest.mark.slow
def test_it_runs_to_the_end_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "CPU-tiny.json").read_text())
    assert record["tiny"] and record["card"] == "CPU" and record["versions"]["torch"] == torch.__version__
    found = record["rows"]
    assert [row["check"] for row in found] == sorted((row["check"] for row in found), key=[*gpu_check.CHECKS].index)
    assert {row["check"] for row in found} == set(gpu_check.CHECKS)
    same = [row for row in found if row["check"] == "parity"]
    assert len(same) == 6 and all(row["difference"] == 0 for row in same)
    assert all(row["cpu"] == row["device"] for row in same[2:]), "the same account for the same seed"
    timed = [row for row in found if row["check"] not in ("parity", "search") and row.get("what") != "weights"]
    assert all(row["seconds"] > 0 for row in timed if "skipped" not in row)
    stages = [row["what"] for row in found if row["check"] == "plans"]
    assert stages == 3 * ["prompts", "velocities", "pictures"]


def test_a_check_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(machine):
        yield {"what": "first"}
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "CHECKS", {"broken": broken, "late": lambda machine: iter([{"what": "last"}])})
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "CPU-tiny.json").read_text())["rows"] == [
        {"check": "broken", "what": "first"},
        {"check": "broken", "error": "RuntimeError: two lines"},
        {"check": "late", "what": "last"},
    ]


def test_a_measurement_that_fails_is_told():
    assert TINY.measure(lambda: 1 / 0) == {"error": "ZeroDivisionError: division by zero"}


def test_no_check_begins_when_the_minutes_are_over():
    assert list(gpu_check.rows_of("parity", TINY, 0)) == [{"check": "parity", "skipped": "8 minutes were over"}]


@pytest.fixture
def card(monkeypatch):
    """A CPU that answers as an H100 would: every branch for CUDA is run."""
    limits = []
    answers = {
        "get_device_name": lambda: "NVIDIA H100 80GB HBM3", "mem_get_info": lambda: (79 * 2**30, 79 * 2**30),
        "memory_allocated": lambda: 3 * 2**30, "max_memory_allocated": lambda: 5 * 2**30, "empty_cache": lambda: None,
        "synchronize": lambda: None, "reset_peak_memory_stats": lambda: None,
        "set_per_process_memory_fraction": limits.append,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(Machine, "device", "cpu")
    return Machine(cuda=True, tiny=True), limits


def test_what_is_planned_stands_beside_what_is_measured(card):
    machine, _ = card
    _, one, two, *_ = rows("velocity", machine)
    assert two["gib"] == 2.0, "5 GiB at the peak, of which 3 were there before"
    count = gpu_check.counted(machine, 64)["velocity"]
    assert one["planned_seconds"] == pytest.approx(count.flops / (0.4 * 989e12))
    assert two["planned_seconds"] == pytest.approx(2 * one["planned_seconds"])
    assert two["planned_gib"] == pytest.approx(2 * count.activations / 2**30 * 2), "two rows, in float32"
    (found,) = rows("search", machine)
    decode = gpu_check.counted(machine, 64)["decode"]
    flops = found["nfe"] * count.flops + found["reward_calls"] * decode.flops
    assert found["planned_seconds"] == pytest.approx(flops / (0.4 * 989e12))


def test_plans_run_under_the_limit_they_were_made_for(card, monkeypatch):
    monkeypatch.setattr(gpu_check, "LIMITS", (*gpu_check.LIMITS[1:2], (80, {})))
    machine, limits = card
    found = rows("plans", machine)
    assert limits == pytest.approx([24 / 79, 1.0])
    assert [row.get("gib") for row in found] == [5.0, 5.0, 5.0, None], "all that is held, not what a call adds"
    assert found[-1]["skipped"] == "the card has 79.0 GiB"


@pytest.mark.apart
def test_eight_bits_are_measured_where_torchao_is_there():
    pytest.importorskip("torchao")
    eight = [row for row in rows("velocity") if row["weights"] == "int8"]
    assert len(eight) == 3 and all(row["seconds"] > 0 for row in eight[1:])
    pipe = gpu_check.pipeline(TINY, {"transformer": "cpu"}, "int8")
    assert "Int8" in type(pipe.transformer.transformer_blocks[0].attn.to_q.weight).__name__


@pytest.mark.parametrize("library", ["diffusers", "psutil"])
def test_a_missing_library_is_named_in_one_line(library):
    code = (
        f"import importlib.util as u; find = u.find_spec; u.find_spec = lambda n, *a: None if n == {library!r} "
        "else find(n, *a); import tools.runs.gpu_check"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"gpu-check needs {library}: pip install {library}" in done.stderr


def test_cards_are_known_by_name_and_memory():
    known = {name: known_gpu(f"NVIDIA {name}", gib) for name, gib in (("A100-SXM4-80GB", 79.1), ("L40S", 44.4))}
    assert known == {"A100-SXM4-80GB": cost.GPUS["A100-80"], "L40S": None}, "an L40S is no L4"
    assert known_gpu("Tesla T4", 14.6) == cost.GPUS["T4"] and known_gpu("NVIDIA H200", 139.7) is None

"""What `make colab-check` rests on; the check itself takes minutes a notebook and is run by hand."""

import re

import nbformat
import pytest
from packaging.requirements import Requirement
from test_repository import PROJECT

from tools.course import colab


def test_the_versions_are_admitted_and_nothing_else_is_installed():
    lines = [line for line in colab.VERSIONS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    versions = dict(line.split("==") for line in lines)
    needed = {one.name: one for one in map(Requirement, PROJECT["dependencies"])}
    assert versions.keys() - needed.keys() == {"ipykernel"}  # the kernel; all else is what the package asks for
    assert needed.keys() <= versions.keys()
    assert [name for name, one in needed.items() if not one.specifier.contains(versions[name])] == []


def test_a_command_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"No such file"):
        colab.command("ls", tmp_path / "missing")


def test_the_seconds_of_a_cell_are_read_from_its_record():
    times = {"iopub.status.busy": "2026-01-01T00:00:59.5+00:00", "iopub.status.idle": "2026-01-01T00:01:02+00:00"}
    assert colab.seconds(nbformat.v4.new_code_cell(metadata={"execution": times})) == 2.5


def test_a_notebook_that_fails_fails_the_check(monkeypatch, tmp_path, capsys):
    wheel = tmp_path / "some.whl"
    wheel.touch()
    monkeypatch.setattr(colab, "prepare", lambda folder: (tmp_path, wheel))

    def twice(source, *_):
        if source.stem.startswith("04"):
            raise RuntimeError("a cell raised")
        return [(3.0, 40.0), (0.1, 38.0)]

    monkeypatch.setattr(colab, "twice", twice)
    assert colab.main(["00", "05"]) == 0
    assert colab.main(["04", "05"]) == 1
    report = capsys.readouterr().out
    assert re.search(r"04_ode_to_sde +FAILED: a cell raised\n", report) and "1 passed, 1 failed" in report

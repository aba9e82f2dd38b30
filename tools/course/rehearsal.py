"""Rehearse the notebooks: run each once, as its student would, and compare what it says with the built copy.

    python -m tools.course.rehearsal [--jobs 2] [00 05 ...]

This writes build/rehearsal/NN_name.ipynb, the notebook with trial cells put in, and has nbval run it; the second half
of this file is the pytest plugin that says what nbval must find. At an exercise the test must stop at the stub, reject
every planted wrong answer and accept the solution. Then the stub is put back, so that a later cell which needs the
solution, and would fail in the student's copy, fails here.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook
from nbval.plugin import IPyNbCell, IPyNbFile, coalesce_streams

from tools.course import build as notebooks
from tools.course import rules as rules

OUT = notebooks.ROOT / "build" / "rehearsal"
START = """\
import os
import sys
os.chdir({folder!r})
sys.path.insert(0, {root!r})"""


def rehearsal(source: Path, built: Path | None = None) -> NotebookNode:
    """The notebook to be run: the source's code with trial cells, and the outputs of the built copy.

    Raises:
        ValueError: the built copy has another number of cells.
    """
    assembled = notebooks.assemble(source).cells
    stored = nbformat.read(built or notebooks.targets(source)[False], as_version=4).cells
    planted = iter([cell.source for cell in notebooks.read(source).cells if "wrong-answers" in notebooks.tags(cell)])
    start = START.format(folder=str(source.parent.parent), root=str(notebooks.ROOT))
    cells, stub, solution = [_step(start, 0, "start")], "", ""
    for index, (cell, before) in enumerate(zip(assembled, stored, strict=True)):
        kind = notebooks.tags(cell)
        if "exercise" in kind:
            stub = cell.source
        elif "solution" in kind:
            solution = cell.source
        elif cell.cell_type == "code":
            if "exercise-test" in kind:
                cells += _trials(index, cell.source, stub, next(planted, ""))
                cells.append(_step(solution, index - 1, f"cell {index - 1}"))
            cells.append(_step(cell.source, index, f"cell {index}", kind, before.outputs))
            if "exercise-test" in kind:
                cells.append(_step(stub, index - 2, f"cell {index - 2}, put back"))
    return new_notebook(cells=cells, metadata=notebooks.METADATA)


def _trials(index: int, test: str, stub: str, planted: str) -> Iterator[NotebookNode]:
    """The stub and every wrong answer, each followed by the test that must not accept it."""
    _, *parts = rules.WRONG.split(planted)
    answers = [("the stub", stub, "NotImplementedError")]
    for number, (what, code) in enumerate(zip(parts[::2], parts[1::2], strict=True), 1):
        answers.append((f"wrong answer {number} ({what})", code, "AssertionError"))
    for who, code, error in answers:
        yield _step(code, index - 2, f"cell {index - 2}: {who}", {"nbval-ignore-output"})
        yield _step(test, index, f"cell {index}: test of {who}", {"raises-exception"}, wanted=error)


def _step(
    code: str,
    index: int,
    name: str,
    kind: set[str] | None = None,
    outputs: list[NotebookNode] | None = None,
    **more: str,
) -> NotebookNode:
    """A cell of a rehearsal, with what the plugin must know: which cell of the notebook it is, and what for."""
    metadata = {"tags": sorted(kind or ()), "rehearsal": {"index": index, "name": name, **more}}
    return new_code_cell(code, metadata=metadata, outputs=outputs or [], execution_count=1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("only", nargs="*", help="names, or beginnings of names, of notebooks")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks run at once")
    options = parser.parse_args(argv)
    sources = notebooks.chosen(notebooks.ROOT.glob("notebooks/src/[0-9][0-9]_*.py"), options.only)
    stale = [line for source in sources for line in notebooks.differences(source)]
    if stale or not sources:
        print("\n".join(stale) or "no such notebook", file=sys.stderr)
        return 1
    shutil.rmtree(OUT, ignore_errors=True)
    paths = [OUT / f"{source.stem}.ipynb" for source in sources]
    for source, path in zip(sources, paths, strict=True):
        notebooks.write(rehearsal(source), path)
    return run(paths, options.jobs)


def run(paths: Iterable[Path], jobs: int = 1) -> int:
    """Have pytest and nbval run rehearsals; its exit status."""
    parallel = ["-n", str(jobs), "--dist", "loadfile"] if jobs > 1 else []
    nbval = ["--nbval-lax", "--nbval-cell-timeout", "300", "-p", "tools.course.rehearsal"]
    command = [sys.executable, "-m", "pytest", "-q", *parallel, *nbval, *map(str, paths)]
    return subprocess.run(command, cwd=notebooks.ROOT, env=notebooks.ONE_THREAD | os.environ).returncode


# --------------------------------------------------------------------------------------------------- the pytest plugin
class Rehearsal(IPyNbFile):
    """A notebook of which nothing more is run once a cell has failed to run."""

    failed = False

    def collect(self) -> Iterator["Step"]:
        for cell in super().collect():
            name = cell.cell.metadata["rehearsal"]["name"]
            yield Step.from_parent(self, name=name, cell_num=0, cell=cell.cell, options=cell.options)


class Step(IPyNbCell):
    """A cell under its name in the notebook, which must also say, or raise, what is expected of it."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.about = self.cell.metadata["rehearsal"]
        self.cell_num = self.about["index"]
        self.output_timeout = 60  # seconds that a busy machine may need to hand over what was printed

    def setup(self) -> None:
        if self.parent.failed:
            pytest.skip("an earlier cell of this notebook failed")
        super().setup()

    def runtest(self) -> None:
        try:
            super().runtest()
        except Exception:
            self.parent.failed = True
            raise
        problem = self.other_error() if "wanted" in self.about else self.other_words()
        if problem:
            self.raise_cell_error(problem)

    def other_error(self) -> str:
        """How a test failed to reject what it must reject; empty when it did."""
        raised, wanted = self.raised(), self.about["wanted"]
        if not raised:
            return "the test accepts it"
        return "" if raised.startswith(f"{wanted}:") else f"the test must raise {wanted}, it raises {raised}"

    def other_words(self) -> str:
        """How what the cell says differs from the built copy; empty when it does not.

        Not where a widget is shown: nbval, which is no front end, hears here what a page shows inside the widget.
        """
        if any(notebooks.VIEW in o.get("data", {}) and not notebooks.is_progress(o) for o in self.test_outputs):
            return ""
        now, before = rules.words(self.test_outputs), rules.words(coalesce_streams(self.cell.outputs))
        return rules.difference(now, before, notebooks.tags(self.cell))

    def raised(self) -> str:
        """The error that the cell raised, empty if none."""
        errors = [f"{o.ename}: {o.evalue}" for o in self.test_outputs or () if o.output_type == "error"]
        return errors[0] if errors else ""

    def repr_failure(self, excinfo: pytest.ExceptionInfo) -> str:
        """The first line, which pytest repeats in its summary, says all; then the cell and the traceback."""
        error = self.raised() if self.parent.failed else ""
        problem = ": ".join(filter(None, (self.path.stem, self.about["name"], str(excinfo.value), error)))
        return f"{problem}\n\n{self.cell.source}\n{getattr(excinfo.value, 'inner_traceback', None) or ''}"


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Generator[None, list[Any], list[Any]]:
    """Have nbval's notebooks collected as rehearsals."""
    found = yield
    return [Rehearsal.from_parent(parent, path=file_path) if isinstance(f, IPyNbFile) else f for f in found]


if __name__ == "__main__":
    sys.exit(main())

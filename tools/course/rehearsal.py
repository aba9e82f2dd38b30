"""Rehearse the notebooks: run each once, as its student would, and compare what it says with the built copy.

    python -m tools.course.rehearsal [--jobs 2] [00 05 ...]

At an exercise the test must stop at the stub, reject every planted wrong answer and accept the solution. Then the stub
is put back, as both copies have it, so that a later cell which needs the solution fails here.
"""

import argparse
import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from tools.course import build as notebooks
from tools.course import rules


@dataclass(frozen=True)
class Step:
    """Code to be run, the error that it must raise, and the cell of the built copy whose words it must repeat."""

    name: str
    code: str
    error: str = ""
    built: NotebookNode | None = field(default=None, repr=False)


def steps(source: Path, built: Path | None = None) -> Iterator[Step]:
    """What a rehearsal runs, in order.

    Raises:
        ValueError: the built copy has another number of cells.
    """
    stored = nbformat.read(built or notebooks.targets(source)[False], as_version=4).cells
    sources = {tag: iter(tagged(source, tag)) for tag in ("exercise", "exercise-test", "wrong-answers")}
    stub = ""
    for index, (cell, before) in enumerate(zip(notebooks.assemble(source).cells, stored, strict=True)):
        kind, name = notebooks.tags(cell), f"cell {index}"
        if "exercise" in kind:
            stub = cell.source
        elif "exercise-test" in kind:
            solved = notebooks.solution(next(sources["exercise"]))
            yield from _trials(index, next(sources["exercise-test"]), stub, solved, next(sources["wrong-answers"], ""))
            yield Step(f"cell {index - 1}, put back", stub)
            yield Step(name, cell.source, built=before)
        elif cell.cell_type == "code":
            yield Step(name, cell.source, built=before)


def tagged(source: Path, tag: str) -> list[str]:
    """The cells of a source that have a tag."""
    return [cell.source for cell in notebooks.read(source).cells if tag in notebooks.tags(cell)]


def _trials(index: int, test: str, stub: str, solved: str, planted: str) -> Iterator[Step]:
    """The stub and every wrong answer, each followed by the test that must not accept it; then the solution."""
    _, *parts = rules.WRONG.split(planted)
    answers = [("the stub", stub, "NotImplementedError")]
    for number, (what, code) in enumerate(zip(parts[::2], parts[1::2], strict=True), 1):
        answers.append((f"wrong answer {number} ({what})", code, "AssertionError"))
    for who, code, error in [*answers, ("the solution", solved, "")]:
        yield Step(f"cell {index - 1}: {who}", code)
        yield Step(f"cell {index}: test of {who}", test, error)


async def rehearse(source: Path, built: Path | None = None) -> list[str]:
    """Run a notebook's rehearsal; returns what went wrong, a line each. It ends where a cell fails to run."""
    problems, notebook = [], new_notebook(metadata=notebooks.METADATA)
    async with notebooks.kernel(notebook, source.parent.parent) as client:
        for index, step in enumerate(steps(source, built)):
            cell = new_code_cell(step.code, metadata={"tags": ["raises-exception"]})  # an error is an output
            notebook.cells.append(cell)
            await client.async_execute_cell(cell, index)
            problem, ends = judge(step, cell.outputs)
            if problem:
                problems.append(f"{source.stem}: {step.name}: {problem}")
            if ends:
                break
    return problems


def judge(step: Step, outputs: list[NotebookNode]) -> tuple[str, bool]:
    """What is wrong with a step's outputs, empty if nothing is, and whether the rehearsal ends here."""
    raised = "".join(f"{o.ename}: {o.evalue}" for o in outputs if o.output_type == "error")
    if step.error:
        wrong = f"the test must raise {step.error}, it raises {raised}" if raised else "the test accepts it"
        return ("" if raised.startswith(f"{step.error}:") else wrong), False
    if raised or step.built is None:
        return raised, bool(raised)
    return rules.difference(rules.words(outputs), rules.words(step.built.outputs), notebooks.tags(step.built)), False


async def rehearse_all(sources: list[Path], jobs: int) -> int:
    """Rehearse notebooks, `jobs` at a time; prints each one's outcome as it ends and returns how many failed."""
    free = asyncio.Semaphore(jobs)

    async def one(source: Path) -> bool:
        async with free:
            try:
                problems = await rehearse(source)
            except (RuntimeError, TimeoutError) as error:  # the kernel died, or a cell took too long
                problems = [f"{source.stem}: {error}"]
        print("\n".join(problems) or f"{source.stem}: passed", flush=True)
        return bool(problems)

    return sum(await asyncio.gather(*map(one, sources)))


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
    return 1 if asyncio.run(rehearse_all(sources, options.jobs)) else 0


if __name__ == "__main__":
    sys.exit(main())

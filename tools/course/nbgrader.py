"""The notebooks as assignments for nbgrader, and a check that it grades them rightly.

    python -m tools.course.nbgrader [04 08 ...]                 writes build/nbgrader/source/NN_name/NN_name.ipynb
    python -m tools.course.nbgrader --check NBGRADER [04 ...]   and has that command release, grade and give feedback

An exercise is worth as many points as it is difficult, 1 to 5; its test gives all of them or none. The check hands in
two submissions of each notebook: a right one, with the solutions, and a wrong one, with the first of the wrong answers
planted for each exercise.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pandas as pd
from nbformat import NotebookNode

from tools.course import build as notebooks
from tools.course import rules
from tools.course.rehearsal import tagged

COURSE = notebooks.ROOT / "build" / "nbgrader"
WORTH = re.compile(r"^### Exercise \d+: .+ \(difficulty (\d) of 5, \d+ minutes\)$", re.M)
OTHER = re.compile(r"\]\((?=\d\d_\w+\.ipynb)")  # a link to another notebook, which no course's folder has
CONFIG = """\
c = get_config()
c.CourseDirectory.course_id = "flowscale"
c.Execute.timeout = 300  # seconds a cell; nbgrader's own limit is 30
"""
RIGHT, WRONG = "right", "wrong"


def points(source: Path) -> list[int]:
    """What each exercise of a notebook is worth."""
    text = "\n".join(cell.source for cell in notebooks.read(source).cells if cell.cell_type == "markdown")
    return [int(worth) for worth in WORTH.findall(text)]


def assignment(source: Path) -> NotebookNode:
    """The notebook as nbgrader's source version: solutions between its markers, tests locked and worth their points."""
    notebook = notebooks.assemble(source, student=True)
    notebook.cells[0].source = notebook.cells[0].source.replace(notebooks.badge(source.stem, student=True), "")
    about = notebooks.project()
    students = f"]({about['repository']}/blob/v{about['version']}/notebooks/student/"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = OTHER.sub(students, cell.source)
    for tag, name in (("exercise", "exercise"), ("exercise-test", "test")):
        cells = [cell for cell in notebook.cells if tag in notebooks.tags(cell)]
        for number, (cell, code, worth) in enumerate(zip(cells, tagged(source, tag), points(source), strict=True), 1):
            cell.source = code
            test = tag == "exercise-test"
            cell.metadata["nbgrader"] = {"grade": test, "locked": test, "solution": not test, "task": False}
            cell.metadata["nbgrader"] |= {"grade_id": f"{name}-{number}", "schema_version": 3}
            cell.metadata["nbgrader"] |= {"points": worth} if test else {}
    return notebook


def submission(released: NotebookNode, answers: list[str]) -> NotebookNode:
    """The released notebook with an answer in each exercise."""
    cells = [cell for cell in released.cells if "exercise" in notebooks.tags(cell)]
    for cell, answer in zip(cells, answers, strict=True):
        cell.source = answer
    return released


def answers(source: Path) -> dict[str, list[str]]:
    """What the two students of the check hand in."""
    planted = [rules.WRONG.split(code)[2] for code in tagged(source, "wrong-answers")]
    return {RIGHT: [notebooks.solution(code) for code in tagged(source, "exercise")], WRONG: planted}


def export(source: Path, course: Path) -> Path:
    """Write a notebook's source version into a course's folder."""
    target = course / "source" / source.stem / source.name.replace(".py", ".ipynb")
    notebooks.write(assignment(source), target)
    return target


def prepare(course: Path, command: Path) -> dict[str, str]:
    """A course's folder with nothing graded, and an environment in which nbgrader runs submissions by this Python."""
    for name in ("source", "release", "submitted", "autograded", "feedback"):
        shutil.rmtree(course / name, ignore_errors=True)
    (course / "gradebook.db").unlink(missing_ok=True)
    kernel = course / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True, exist_ok=True)
    launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    environment = notebooks.ONE_THREAD | {"PYTHONPATH": str(notebooks.ROOT)}
    about = {"argv": launch, "display_name": "Python 3", "language": "python", "env": environment}
    (kernel / "kernel.json").write_text(json.dumps(about), encoding="utf-8")
    (course / "nbgrader_config.py").write_text(CONFIG, encoding="utf-8")
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"  # nbgrader calls alembic, which is installed beside it
    return os.environ | {"JUPYTER_PATH": str(course / "jupyter"), "PATH": path}


def grade(source: Path, course: Path, command: Path, environment: dict[str, str]) -> pd.DataFrame:
    """Release a notebook, hand both submissions in, grade them and give feedback; the grades of all handed in so far.

    Raises:
        RuntimeError: nbgrader failed; the message holds the end of what it said.
    """

    def nbgrader(*arguments: str) -> None:
        ran = subprocess.run([command, *arguments], cwd=course, env=environment, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"nbgrader {' '.join(arguments)}: {(ran.stdout + ran.stderr)[-2000:]}")

    name = source.stem
    export(source, course)
    nbgrader("generate_assignment", name, "--create")
    for student, given in answers(source).items():
        released = nbformat.read(course / "release" / name / f"{name}.ipynb", as_version=4)
        notebooks.write(submission(released, given), course / "submitted" / student / name / f"{name}.ipynb")
    nbgrader("autograde", name, "--create")
    nbgrader("generate_feedback", name)
    nbgrader("export", "--to", "grades.csv")
    return pd.read_csv(course / "grades.csv").set_index(["assignment", "student_id"])


def faults(source: Path, course: Path, grades: pd.DataFrame) -> Iterator[str]:
    """What is wrong with the grades of a notebook and with what its students get; nothing, if all is well."""
    name, worth = source.stem, sum(points(source))
    for student, wanted in ((RIGHT, worth), (WRONG, 0)):
        row = grades.loc[(name, student)]
        if (row.score, row.max_score) != (wanted, worth):
            yield f"{name}: the {student} submission has {row.score} of {row.max_score} points, not {wanted} of {worth}"
        page = course / "feedback" / student / name / f"{name}.html"
        if not page.exists() or "test-1" not in page.read_text(encoding="utf-8"):
            yield f"{name}: no feedback for the {student} submission"
    released = nbformat.read(course / "release" / name / f"{name}.ipynb", as_version=4)
    code = "\n".join(cell.source for cell in released.cells)
    if "SOLUTION" in code or code.count("raise NotImplementedError") < len(points(source)):
        yield f"{name}: the released notebook shows a solution"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("only", nargs="*", help="names, or beginnings of names, of notebooks")
    parser.add_argument("--check", metavar="NBGRADER", type=Path, help="the command that grades")
    parser.add_argument("--course", type=Path, default=COURSE, help="the course's folder")
    parser.add_argument("--folder", type=Path, default=notebooks.ROOT / "notebooks", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    sources = notebooks.chosen(options.folder.glob("src/[0-9][0-9]_*.py"), options.only)
    if not options.check:
        for source in sources:
            print(export(source, options.course))
        return 0 if sources else 1
    command, found = options.check.absolute(), list[str]()
    environment = prepare(options.course, command)
    print(f"{'':28}{'points':>8}{RIGHT:>8}{WRONG:>8}{'seconds':>9}")
    for source in sources:
        start = time.perf_counter()
        grades = grade(source, options.course, command, environment)
        scores = "".join(f"{grades.loc[(source.stem, student)].score:8.0f}" for student in (RIGHT, WRONG))
        print(f"{source.stem:28}{sum(points(source)):8}{scores}{time.perf_counter() - start:9.0f}", flush=True)
        found += faults(source, options.course, grades)
    print("\n".join(found) or f"Graded rightly; submissions and feedback are in {options.course}")
    return 1 if found or not sources else 0


if __name__ == "__main__":
    sys.exit(main())

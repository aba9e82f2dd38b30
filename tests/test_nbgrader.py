"""The notebooks as nbgrader's assignments: the metadata that it wants, and the grades that it gives."""

import os
import re

import nbformat
import pytest
from test_notebooks import SAMPLE, every_notebook

from tools.course import build as notebooks
from tools.course import nbgrader

COMMAND = notebooks.ROOT / "build" / "nbgrader-venv" / "bin" / "nbgrader"


@every_notebook
def test_assignment_is_marked_up_for_nbgrader(source):
    made = nbgrader.assignment(source)
    nbformat.validate(made)
    worth = nbgrader.points(source)
    marked = [cell for cell in made.cells if "nbgrader" in cell.metadata]
    assert [cell.metadata["nbgrader"]["grade_id"] for cell in marked] == [
        f"{name}-{number}" for number in range(1, len(worth) + 1) for name in ("exercise", "test")
    ]
    for exercise, test, points in zip(marked[::2], marked[1::2], worth, strict=True):
        assert "### BEGIN SOLUTION" in exercise.source and "### END SOLUTION" in exercise.source
        assert (exercise.metadata["nbgrader"]["solution"], exercise.metadata["nbgrader"]["locked"]) == (True, False)
        assert (test.metadata["nbgrader"]["grade"], test.metadata["nbgrader"]["locked"]) == (True, True)
        assert test.metadata["nbgrader"]["points"] == points and 1 <= points <= 5
        assert notebooks.NOT_DONE not in test.source  # an exercise that is not done has no points
    assert not any("A solution" in cell.source for cell in made.cells)
    text = "\n".join(cell.source for cell in made.cells if cell.cell_type == "markdown")
    assert all(link.startswith(("https://", "#")) for link in re.findall(r"\]\(([^)]+)\)", text)), "it travels alone"
    assert f"({source.stem}.ipynb)" not in made.cells[0].source and f"/{source.stem}.ipynb" not in made.cells[0].source


@every_notebook
def test_submissions_differ_in_the_answers_only(source):
    for given in nbgrader.answers(source).values():
        released = nbgrader.assignment(source)
        handed_in = nbgrader.submission(nbgrader.assignment(source), given)
        changed = [a for a, b in zip(released.cells, handed_in.cells, strict=True) if a != b]
        assert len(given) == len(changed) and all("exercise" in notebooks.tags(cell) for cell in changed)


@pytest.mark.slow
@pytest.mark.skipif(not COMMAND.exists(), reason="`make nbgrader-check` installs nbgrader")
def test_nbgrader_grades_a_right_and_a_wrong_submission(tmp_path, capsys):
    source = tmp_path / "notebooks" / "src" / "99_sample.py"
    source.parent.mkdir(parents=True)
    source.write_text(SAMPLE.replace("halving (difficulty 1", "halving (difficulty 3"), encoding="utf-8")
    arguments = ["--check", str(COMMAND), "--folder", str(source.parents[1]), "--course", str(tmp_path / "course")]
    (tmp_path / "course").mkdir()
    assert nbgrader.main(arguments) == 0, capsys.readouterr().out
    assert "99_sample" in capsys.readouterr().out
    page = tmp_path / "course" / "feedback" / nbgrader.WRONG / "99_sample" / "99_sample.html"
    assert "AssertionError" in page.read_text(encoding="utf-8")

    # A checker that cannot fail checks nothing: the wrong answer of one exercise, put in the right one's place.
    environment, half = nbgrader.prepare(tmp_path / "course", COMMAND), nbgrader.answers(source)
    half[nbgrader.RIGHT][1] = half[nbgrader.WRONG][1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nbgrader, "answers", lambda _: half)
        grades = nbgrader.grade(source, tmp_path / "course", COMMAND, environment)
    (fault,) = nbgrader.faults(source, tmp_path / "course", grades)
    assert fault == "99_sample: the right submission has 1.0 of 4.0 points, not 4 of 4"
    assert os.environ.get("JUPYTER_PATH") != environment["JUPYTER_PATH"]

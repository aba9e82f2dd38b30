"""The teacher's notes agree with the notebooks: exercises, points, headings, and plans that add up."""

import re

from test_notebooks import SOURCES, every_notebook

from tools.course import build as notebooks
from tools.course import measure, nbgrader

FOLDER = notebooks.ROOT / "notebooks" / "instructor"
PARTS = ["Objectives", "50 minutes", "90 minutes", "What students get wrong", "Questions, with answers", "Grading"]
TITLE = re.compile(r"^### (Exercise \d+: .+) \(difficulty \d of 5, \d+ minutes\)$", re.M)


def words(source):
    return "\n".join(cell.source for cell in notebooks.read(source).cells if cell.cell_type == "markdown")


def sections(text):
    """The text below each heading of a page."""
    _, *parts = re.split(r"^## (.+)\n", text, flags=re.M)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def table(text):
    """The cells of a Markdown table's rows, its head left out."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.M)]
    return rows[2:]


def known(quoted, source):
    """Whether a notebook has a heading that begins so."""
    return any(heading.startswith(quoted) for heading in re.findall(r"^#+ (.+)$", words(source), re.M))


def page(source):
    """The notes of a notebook."""
    return (FOLDER / f"{source.stem}.md").read_text(encoding="utf-8")


def test_every_notebook_has_notes_and_no_others_are_there():
    names = {path.stem for path in FOLDER.glob("*.md")}
    assert names == {source.stem for source in SOURCES} | {"README"}


@every_notebook
def test_notes_have_their_parts_and_plans_add_up(source):
    found = sections(page(source))
    assert list(found) == PARTS
    for minutes in (50, 90):
        plan = table(found[f"{minutes} minutes"])
        assert sum(int(row[0]) for row in plan) == minutes, plan
        quoted = [part for row in plan for part in re.findall(r'"([^"]+)"', row[1])]
        assert [part for part in quoted if not known(part, source)] == []
    for part in ("What students get wrong", "Questions, with answers"):
        assert len(re.findall(r"^(?:- |\d\. )", found[part], re.M)) >= 4


@every_notebook
def test_grading_tables_are_those_of_the_exercises(source):
    text = page(source)
    *rows, last = table(sections(text)["Grading"])
    worth = nbgrader.points(source)
    titles = TITLE.findall(words(source))
    assert [(row[0], int(row[1])) for row in rows] == list(zip(titles, worth, strict=True))
    assert last[:2] == ["Sum", str(sum(worth))]
    numbers = {int(number) for number in re.findall(r"\b[Ee]xercise (\d)", text)}
    numbers |= {int(n) for pair in re.findall(r"\b[Ee]xercises ([\d, and]+)", text) for n in re.findall(r"\d", pair)}
    assert numbers <= set(range(1, len(worth) + 1))


def test_readme_tells_minutes_and_points():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = {
        re.search(r"\((.+)\.md\)", row[0])[1]: [int(cell) for cell in row[1:]] for row in table(text.split("\n## ")[0])
    }
    assert list(rows) == [source.stem for source in SOURCES]
    for source in SOURCES:
        *minutes, points = rows[source.stem]
        now = measure.measure(source)
        for name, said in zip(("core", "exercises", "deeper"), minutes, strict=True):
            assert abs(said - now[name]) <= 10, f"{source.stem}, {name}: {now[name]} minutes are measured, not {said}"
        assert points == sum(nbgrader.points(source)), source.stem


def test_plans_of_courses_add_up_and_name_what_is_there():
    found = sections((FOLDER / "README.md").read_text(encoding="utf-8"))
    by_number = {source.stem[:2]: source for source in SOURCES}
    for name, minutes in (("A workshop of one day", 420), ("A tutorial of three hours", 180)):
        rows = table(found[name])
        assert sum(int(row[0]) for row in rows) == minutes
        for _, number, parts in rows:
            quoted = re.findall(r'"([^"]+)"', parts)
            assert not quoted or all(known(part, by_number[number]) for part in quoted), parts
    course = table(found["A course of four weeks"])
    assert [row[0] for row in course] == [str(number) for number in range(1, 9)]
    for number, exercises in re.findall(r"(\d\d): exercises? ([\d and,]+)", "; ".join(row[2] for row in course)):
        assert max(map(int, re.findall(r"\d", exercises))) <= len(nbgrader.points(by_number[number]))


def test_links_lead_somewhere():
    for path in FOLDER.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (FOLDER / target).exists(), f"{path.name}: {target}"

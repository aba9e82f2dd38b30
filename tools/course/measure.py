"""What the notebooks ask of a reader: one line for each, counted from its source.

    python -m tools.course.measure [00 05 ...]

The core is what stands before the recap. Minutes: 200 words a minute, 20 seconds a line of code that is seen, and what
the exercises say. In the rest, where the proofs stand, each displayed formula takes two minutes more.
"""

import argparse
import re
import sys
from pathlib import Path

from tools.course import build as notebooks
from tools.course import rules

COLUMNS = {
    "words": "words, core",
    "code": "lines of code, core",
    "first": "words before the first figure",
    "long": f"cells over {rules.SEEN_LINES} lines",
    "wide": f"lines over {rules.SEEN_WIDTH} columns",
    "asserts": "asserts that are seen",
    "figures": "figures, all",
    "answered": "questions with an answer, of all",
    "core": "minutes, core",
    "exercises": "minutes, exercises",
    "deeper": "minutes, the rest",
}
Row = dict[str, int | str]


def minutes(words: int, lines: int) -> int:
    return round(words / 200 + lines / 3)


def measure(source: Path) -> Row:
    """A notebook's line of the table."""
    cells = notebooks.read(source).cells
    core, asked = rules.core(cells), [answered for *_, answered in rules.questions(cells)]
    seen = [cell for cell in rules.seen(cells) if not notebooks.tags(cell) & {"exercise", "exercise-test"}]
    lines = [line for cell in seen for line in cell.source.splitlines()]
    code = sum(len(cell.source.splitlines()) for cell in seen if cell in core)
    rest = [cell for cell in cells if cell not in core and "### Exercise" not in cell.source]
    formulas = sum(cell.source.count("$$") // 2 for cell in rest if cell.cell_type == "markdown")
    marked = re.findall(r"^### Exercise .*, (\d+) minutes\)$", "\n".join(cell.source for cell in cells), re.M)
    return {
        "words": rules.prose(core),
        "code": code,
        "first": rules.prose(rules.before_figure(cells)),
        "long": sum(len(cell.source.splitlines()) > rules.SEEN_LINES for cell in seen),
        "wide": sum(len(line) > rules.SEEN_WIDTH for line in lines),
        "asserts": sum(line.lstrip().startswith("assert ") for line in lines),
        "figures": sum(len(notebooks.alts(cell)) for cell in cells),
        "answered": f"{sum(asked)}/{len(asked)}",
        "core": minutes(rules.prose(core), code),
        "exercises": sum(map(int, marked)),
        "deeper": minutes(rules.prose(rest), len(lines) - code) + 2 * formulas,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("only", nargs="*", help="names, or beginnings of names, of notebooks")
    parser.add_argument("--folder", type=Path, default=notebooks.ROOT / "notebooks", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    rows = {p.stem: measure(p) for p in notebooks.chosen(options.folder.glob("src/*.py"), options.only)}
    print(f"{'':28}" + "".join(f"{name:>10}" for name in COLUMNS))
    for name, row in rows.items():
        print(f"{name:28}" + "".join(f"{row[column]:>10}" for column in COLUMNS))
    print("\n" + "; ".join(f"{name}: {what}" for name, what in COLUMNS.items()))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())

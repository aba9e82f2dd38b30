"""Run every notebook as a reader would, headless, and print one table.

    python -m tools.tutorial [--jobs 2] [00 05 ...]

The executed notebooks, and the same as HTML pages, go to build/tutorial/.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from tqdm import tqdm

from tools import notebooks


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str
    seconds: float
    memory: float | None
    page: Path


def run(path: Path, out: Path, bar: tqdm) -> Outcome:
    """Execute one notebook, keep it and its page whatever happens."""
    notebook, start, memory, status = nbformat.read(path, as_version=4), time.perf_counter(), None, "passed"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    done = 0
    try:
        with notebooks.kernel(notebook, cwd=path.parent) as client:
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
                done += 1
                bar.update()
            memory = notebooks.usage(client).memory
    except CellExecutionError as error:
        status = f"FAILED, cell {done}: {error.ename}: {error.evalue}".splitlines()[0][:60]
    except Exception as error:  # the kernel died or timed out: a result as well, the other notebooks go on
        status = f"FAILED, cell {done}: {type(error).__name__}"
    bar.update(len(notebook.cells) - done)
    seconds = time.perf_counter() - start
    nbformat.write(notebook, out / path.name)
    page = (out / path.name).with_suffix(".html")
    page.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    return Outcome(path.stem, status, seconds, memory, page)


def table(outcomes: list[Outcome]) -> str:
    head = ("notebook", "status", "seconds", "peak memory MB", "where to look")
    rows = [
        (o.name, o.status, f"{o.seconds:.0f}", "-" if o.memory is None else f"{o.memory:.0f}", os.path.relpath(o.page))
        for o in outcomes
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    right = {2, 3}
    lines = [
        "  ".join(
            text.rjust(w) if i in right else text.ljust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, tuple("-" * width for width in widths), *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("only", nargs="*", help="names, or beginnings of names, of notebooks")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks run at once")
    parser.add_argument("--folder", type=Path, default=notebooks.ROOT / "notebooks", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=notebooks.ROOT / "build" / "tutorial", help="where results go")
    options = parser.parse_args(argv)
    paths = sorted(options.folder.glob("[0-9][0-9]_*.ipynb"))
    if options.only:
        paths = [path for path in paths if path.stem.startswith(tuple(options.only))]
    if not paths:
        print("no such notebook", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    cells = sum(len(nbformat.read(path, as_version=4).cells) for path in paths)
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=cells, unit="cell", leave=False, disable=None) as bar:
        outcomes = list(pool.map(lambda path: run(path, options.out, bar), paths))
    print(table(outcomes))
    failed = sum(outcome.status != "passed" for outcome in outcomes)
    print(f"\n{len(outcomes) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Run every notebook as a reader would, headless, and print one table.

    python -m tools.course.tutorial [--jobs 2] [--force] [00 05 ...]

The executed notebooks, and the same as HTML pages, go to build/tutorial/. A notebook that passed there is run again
only when it, the package, its data or the libraries have changed since; so an interrupted run can be resumed.
"""

import argparse
import asyncio
import functools
import hashlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from tqdm import tqdm

from tools.course import build as notebooks


@dataclass(frozen=True)
class Outcome:
    """What running a notebook came to; memory in MB, None where the run did not reach its end."""

    name: str
    status: str
    seconds: float
    memory: float | None
    page: Path


@functools.cache
def surroundings() -> str:
    """A digest of all that a notebook's results depend on beside itself."""
    files = [*notebooks.ROOT.glob("flowscale_lite/**/*.py"), *notebooks.ROOT.glob("data/**/*.*")]
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted([*files, notebooks.ROOT / "constraints.txt"]):
        digest.update(path.relative_to(notebooks.ROOT).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    return hashlib.sha256(surroundings().encode() + path.read_bytes()).hexdigest()


def recall(path: Path, out: Path) -> Outcome | None:
    """The outcome of an earlier run that passed, if nothing has changed since."""
    executed = out / path.name
    page = executed.with_suffix(".html")
    if not (executed.exists() and page.exists()):
        return None
    passed = nbformat.read(executed, as_version=4).metadata.get("passed", {})
    if passed.get("fingerprint") != fingerprint(path):
        return None
    return Outcome(path.stem, "passed before", passed["seconds"], passed["memory"], page)


async def run(path: Path, out: Path, bar: tqdm) -> Outcome:
    """Execute one notebook; keep it and its page whatever it comes to, unless the run itself is called off."""
    notebook, start, memory, status = nbformat.read(path, as_version=4), time.perf_counter(), None, "passed"
    key = fingerprint(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    try:
        memory = (await notebooks.execute(notebook, path.parent, bar.update)).memory
    except Exception as error:  # also that the kernel died, or a cell took too long: the other notebooks go on
        task = asyncio.current_task()
        if task and task.cancelling():  # nbclient takes an interrupt for the kernel's death
            raise asyncio.CancelledError from None
        begun = [index for index, cell in enumerate(notebook.cells) if cell.get("execution_count")]
        bar.update(len(notebook.cells) - max(begun, default=0))
        name, what = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", error)
        status = f"FAILED, cell {max(begun, default=0)}: {name}: {what}".splitlines()[0]
    seconds = time.perf_counter() - start
    if status == "passed":
        notebook.metadata["passed"] = {"fingerprint": key, "seconds": seconds, "memory": memory}
    page = await asyncio.to_thread(keep, notebook, out / path.name)
    return Outcome(path.stem, status, seconds, memory, page)


def keep(notebook: NotebookNode, path: Path) -> Path:
    """Write an executed notebook and its page; returns where the page is."""
    page = path.with_suffix(".html")
    page.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    notebooks.write(notebook, path)
    return page


async def run_all(paths: list[Path], out: Path, jobs: int) -> list[Outcome]:
    """Run the notebooks, `jobs` at a time, under one progress bar. An interrupt ends their kernels at once."""
    cells = sum(len(nbformat.read(path, as_version=4).cells) for path in paths)
    free = asyncio.Semaphore(jobs)
    with tqdm(total=cells, unit="cell", leave=False, disable=None) as bar:

        async def one(path: Path) -> Outcome:
            async with free:
                return await run(path, out, bar)

        return await asyncio.gather(*map(one, paths))


def table(outcomes: list[Outcome]) -> str:
    """A line for each notebook, the status last, for it may be long."""
    lines = [f"{'notebook':28}{'seconds':>8}{'peak MB':>9}  {'where to look':46}  status"]
    for o in outcomes:
        memory = "-" if o.memory is None else f"{o.memory:.0f}"
        lines.append(f"{o.name:28}{o.seconds:8.0f}{memory:>9}  {os.path.relpath(o.page):46}  {o.status}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("only", nargs="*", help="names, or beginnings of names, of notebooks")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks run at once")
    parser.add_argument("--force", action="store_true", help="run also what passed before and has not changed")
    parser.add_argument("--folder", type=Path, default=notebooks.ROOT / "notebooks", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=notebooks.ROOT / "build" / "tutorial", help="where results go")
    options = parser.parse_args(argv)
    paths = notebooks.chosen(options.folder.glob("[0-9][0-9]_*.ipynb"), options.only)
    if not paths:
        print("no such notebook", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    earlier = {} if options.force else {path: recall(path, options.out) for path in paths}
    outcomes = {path: outcome for path, outcome in earlier.items() if outcome}
    left = [path for path in paths if path not in outcomes]
    try:
        outcomes |= zip(left, asyncio.run(run_all(left, options.out, options.jobs)), strict=True)
    except KeyboardInterrupt:
        print("\nInterrupted. What has passed is kept: run it again to go on.", file=sys.stderr)
        return 130
    print(table([outcomes[path] for path in paths]))
    failed = sum(outcome.status.startswith("FAILED") for outcome in outcomes.values())
    if len(left) < len(paths):
        print("\n'passed before': nothing it depends on has changed since; FORCE=1 runs it again.")
    print(f"\n{len(outcomes) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

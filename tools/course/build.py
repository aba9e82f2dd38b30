"""Build the notebooks: notebooks/src/NN_name.py -> notebooks/NN_name.ipynb and notebooks/student/NN_name.ipynb.

    python -m tools.course.build              rebuild what differs from its source
    python -m tools.course.build --force 03   rebuild 03 in any case
    python -m tools.course.build --check      fail when a built file differs from its source; executes nothing

A source is a Jupytext percent script. CONTRIBUTING.md tells the conventions.
"""

import argparse
import ast
import asyncio
import base64
import contextlib
import copy
import datetime
import hashlib
import html
import io
import json
import os
import re
import sys
import textwrap
import tomllib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
import zmq
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_core.utils import ensure_async
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image
from traitlets import Type

ROOT = Path(__file__).resolve().parents[2]
BADGE, MEASURED = "<!-- badge -->", "<!-- measured -->"
MEASURED_LINE = re.compile(rf"^{MEASURED}.*$", re.M)
SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION$", re.M | re.S)
MARKERS = re.compile(r"^[ \t]*### (BEGIN|END) SOLUTION\n", re.M)
PROGRESS = re.compile(r"\d+%\|")
NOT_DONE = "Not done yet."
# A tag, and what jupyter-book is to do with its cells. An exercise's test often shows the answer.
HIDDEN = {"check": "remove-cell", "plot": "hide-input", "exercise-test": "hide-input"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # repeatable, and what the notebooks' heads say
VIEW = "application/vnd.jupyter.widget-view+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {
        "name": "python",
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "pygments_lexer": "ipython3",
        "codemirror_mode": {"name": "ipython", "version": 3},
    },
}
SETUP = """\
# Set-up, the same in every notebook: does nothing where flowscale_lite is installed.
import importlib
import subprocess
import sys
from importlib.util import find_spec

WHEEL = "{wheel}"
if find_spec("flowscale_lite") is None:
    if "google.colab" not in sys.modules:
        raise ModuleNotFoundError("flowscale_lite is missing: run `make lab` in the clone, or `pip install` " + WHEEL)
    print("Installing flowscale_lite, once a session: some seconds.")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", WHEEL]
    if subprocess.run(pip, capture_output=True).returncode:
        todo = "open it in a browser, upload the file here, put the file's path into WHEEL and run this cell again"
        raise ConnectionError("could not install " + WHEEL + ": " + todo)
    importlib.invalidate_caches()"""
USAGE = """\
import json, pathlib, re, resource, sys
usage, status = resource.getrusage(resource.RUSAGE_SELF), pathlib.Path("/proc/self/status")
# Linux hands ru_maxrss on from the process that started this one; VmHWM is our own
kilobytes = int(re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1]) if status.exists() else usage.ru_maxrss
print(json.dumps([usage.ru_utime + usage.ru_stime, kilobytes / (2**20 if sys.platform == "darwin" else 2**10)]))"""


@dataclass(frozen=True)
class Usage:
    """What a run cost: seconds of CPU time, peak memory in MB."""

    seconds: float
    memory: float

    def __str__(self) -> str:
        today = datetime.datetime.now(datetime.UTC).date()
        return f"Measured {today}, one CPU thread: {self.seconds:.0f} s of CPU time, {self.memory:.0f} MB of memory."


def tags(cell: NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def alts(cell: NotebookNode) -> list[str]:
    """The texts that stand for a cell's figures: its metadata `alt`, one text, or a list with one for each figure."""
    alt = cell.metadata.get("alt", [])
    return [alt] if isinstance(alt, str) else list(alt)


def read(source: Path) -> NotebookNode:
    return jupytext.read(source, fmt="py:percent")


def project(root: Path = ROOT) -> dict[str, str]:
    """Repository address, the package's version, its wheel's address: all from pyproject.toml and nowhere else."""
    meta = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository, version = meta["urls"]["Repository"], meta["version"]
    file = f"{meta['name'].replace('-', '_')}-{version}-py3-none-any.whl"
    return {"repository": repository, "version": version, "wheel": f"{repository}/releases/download/v{version}/{file}"}


def badge(name: str, student: bool = False) -> str:
    """A Colab badge that opens this copy, and a link to the other one."""
    about = project()
    where = about["repository"].replace("https://github.com/", "https://colab.research.google.com/github/")
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    folder = "notebooks/student" if student else "notebooks"
    other = f"[With outputs and solutions](../{name}.ipynb)" if student else f"[Without outputs](student/{name}.ipynb)"
    return f"[![Open in Colab]({image})]({where}/blob/v{about['version']}/{folder}/{name}.ipynb) {other}"


def stub(code: str) -> str:
    """The exercise as the student gets it."""
    return SOLUTION.sub(r"\1# YOUR CODE HERE\n\1raise NotImplementedError", code)


def solution(code: str) -> str:
    """The exercise solved."""
    return MARKERS.sub("", code + "\n").rstrip("\n")


def patient(test: str) -> str:
    """An exercise's test that says so, and lets the run go on, where the exercise is not done.

    Raises:
        ValueError: the test holds a string over several lines, which an indent would change.
    """
    code = f'try:\n{textwrap.indent(test, "    ")}\nexcept NotImplementedError:\n    print("{NOT_DONE}")'
    (block,) = ast.parse(code).body
    if not isinstance(block, ast.Try) or ast.dump(ast.Module(block.body, [])) != ast.dump(ast.parse(test)):
        raise ValueError(f"a test must not hold strings over several lines, which an indent changes: {test[:60]}")
    return code


def folded(code: str) -> NotebookNode:
    """A solution as text: to be read, never run in the reader's place."""
    return new_markdown_cell(
        f"<details><summary>A solution</summary>\n\n```python\n{code}\n```\n\n</details>",
        metadata={"tags": ["solution"]},
    )


def assemble(source: Path, student: bool = False) -> NotebookNode:
    """The notebook a source stands for, not yet executed. Its cells' names depend on what they say only."""
    cells: list[NotebookNode] = []
    solved = ""
    for cell in read(source).cells:
        kind = tags(cell)
        if "wrong-answers" in kind:
            continue
        kept = {key: cell.metadata[key] for key in ("alt", "tags") if key in cell.metadata}
        cell = NotebookNode({**cell, "metadata": kept})
        if "setup" in kind:
            cell.source = SETUP.format(**project())
        if not cells:
            cell.source = cell.source.replace(BADGE, badge(source.stem, student))
        for tag in kind & HIDDEN.keys():
            cell.metadata |= {"jupyter": {"source_hidden": True}, "tags": [*cell.metadata["tags"], HIDDEN[tag]]}
        if "exercise" in kind:
            solved = solution(cell.source)
            cell.source = stub(cell.source)
        if "exercise-test" in kind:
            cell.source = patient(cell.source)
        cells.append(cell)
        if "exercise-test" in kind and not student:
            cells.append(folded(solved))
    seen: dict[str, int] = {}
    for cell in cells:
        digest = hashlib.sha256(f"{cell.cell_type} {cell.source}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    notebook = new_notebook(cells=cells, metadata=copy.deepcopy(METADATA), nbformat_minor=5)
    return nbformat.from_dict(json.loads(json.dumps(notebook)))


class WatchfulChannel(AsyncZMQSocketChannel):
    """A channel on which no reply is missed that arrives while a message is being sent.

    Messages are sent through a blocking twin of the socket. The twin may take the signal that a reply has come. The
    event loop then waits for that reply until the cell's time is over (github.com/jupyter/nbclient/issues/312). It
    happens to a cell with a slider: nbclient sends while it waits. Reading the events tells the loop what is there.
    """

    def send(self, msg: dict) -> None:
        super().send(msg)
        self.socket.get(zmq.EVENTS)


class Client(AsyncKernelClient):
    shell_channel_class = Type(WatchfulChannel)


@contextlib.asynccontextmanager
async def kernel(notebook: NotebookNode, cwd: Path) -> AsyncIterator[NotebookClient]:
    """A client with a fresh kernel, for executing the notebook's cells one by one. The kernel ends with the context."""
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(cwd)}},
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
    )
    environment = ONE_THREAD | os.environ | {"PYTHONPATH": str(ROOT)}  # this clone's package, whatever is installed
    # Not client.setup_kernel: it takes over the signals, and an interrupt would end one kernel of several.
    manager = client.create_kernel_manager()
    manager.client_factory = Client
    try:
        await client.async_start_new_kernel(env=environment)
        await client.async_start_new_kernel_client()
        yield client
    finally:
        if client.kc is not None:
            client.kc.stop_channels()
        await ensure_async(manager.shutdown_kernel(now=True))


async def usage(client: NotebookClient) -> Usage:
    """What the client's kernel has used so far, in its own words."""
    cell = new_code_cell(USAGE)
    client.nb.cells.append(cell)
    await client.async_execute_cell(cell, len(client.nb.cells) - 1)
    client.nb.cells.pop()
    return Usage(*json.loads(cell.outputs[0].text))


def is_progress(output: NotebookNode) -> bool:
    """Whether an output is a progress bar, printed or a widget's, or the blanks that wipe a printed one out."""
    text = "".join(output.get("text", "")) + "".join(output.get("data", {}).get("text/plain", ""))
    return bool(PROGRESS.search(text)) or (output.get("name") == "stderr" and not text.strip())


def lasting(output: NotebookNode) -> bool:
    """Whether an output is worth keeping: progress bars and views of live widgets are not."""
    return VIEW not in output.get("data", {}) and not is_progress(output)


def store_figures(cell: NotebookNode) -> None:
    """Keep a cell's lasting outputs, and of each figure a small PNG, the same as HTML, and the text alone.

    JupyterLab reads the alternative text of HTML only; LaTeX, and an editor that does not trust the notebook, show the
    PNG only. nbconvert reads the text in the PNG's metadata.

    Raises:
        ValueError: the cell shows more or fewer figures than `alt` has texts. A cell with a widget may show none.
    """
    widget = any(VIEW in output.get("data", {}) and not is_progress(output) for output in cell.outputs)
    cell.outputs = [output for output in cell.outputs if lasting(output)]
    figures, texts = [output for output in cell.outputs if "image/png" in output.get("data", {})], alts(cell)
    if len(figures) != len(texts) and (figures or not widget):
        raise ValueError(f"{len(figures)} figures, {len(texts)} texts in alt: {cell.source[-80:]}")
    for figure, text in zip(figures, texts, strict=False):
        png = small(figure.data["image/png"])
        image = f'<img alt="{html.escape(text)}" src="data:image/png;base64,{png}">'
        figure.data = {"image/png": png, "text/html": image, "text/plain": text}
        figure.metadata = {"image/png": {"alt": text}}


def small(png: str) -> str:
    """A PNG, in base64, with a palette of 256 colours, in which no colour is far from its own."""
    image, out = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1).save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode("ascii")


async def execute(notebook: NotebookNode, cwd: Path, on_cell: Callable[[], object] = lambda: None) -> Usage:
    """Run all cells in place, top to bottom, calling `on_cell` after each."""
    async with kernel(notebook, cwd) as client:
        for index, cell in enumerate(notebook.cells):
            await client.async_execute_cell(cell, index)
            if cell.cell_type == "code":
                store_figures(cell)
            on_cell()
        return await usage(client)


def targets(source: Path) -> dict[bool, Path]:
    """Where the built files go, by whether they are the student's."""
    folder = source.parent.parent
    return {False: folder / f"{source.stem}.ipynb", True: folder / "student" / f"{source.stem}.ipynb"}


def reused(notebook: NotebookNode, target: Path) -> str:
    """Take the outputs of an earlier build that ran the same code; the set-up cell, which prints nothing, may differ.

    Returns what was measured then, and nothing where the notebook must be executed.
    """
    if not target.exists():
        return ""
    earlier = nbformat.read(target, as_version=4)
    ours, theirs = ([c for c in n.cells if c.cell_type == "code"] for n in (notebook, earlier))
    told = [[(c.source, c.metadata) for c in cells if "setup" not in tags(c)] for cells in (ours, theirs)]
    measured = MEASURED_LINE.search(earlier.cells[0].source)
    if told[0] != told[1] or not measured or any(c.execution_count is None for c in theirs):
        return ""
    for cell, before in zip(ours, theirs, strict=True):
        cell.outputs, cell.execution_count = before.outputs, before.execution_count
    return measured[0].removeprefix(MEASURED).strip()


def build(source: Path, force: bool = False) -> str:
    """Write both copies, executed where code has changed or `force` is set; returns what was measured."""
    copies = {student: assemble(source, student) for student in targets(source)}  # of one state of the source
    used = "" if force else reused(copies[False], targets(source)[False])
    used = used or str(asyncio.run(execute(copies[False], cwd=source.parent.parent)))
    for student, target in targets(source).items():
        copies[student].cells[0].source = copies[student].cells[0].source.replace(MEASURED, f"{MEASURED} {used}")
        nbformat.validate(copies[student])
        write(copies[student], target)
    return used


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook whole or not at all: another process may be reading it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    nbformat.write(notebook, partial)
    partial.replace(path)


def skeleton(notebook: NotebookNode) -> list[tuple]:
    """What a built notebook must share with its source: everything but outputs, counts and the measured line."""
    cells = [(c.id, c.cell_type, c.metadata, MEASURED_LINE.sub(MEASURED, c.source)) for c in notebook.cells]
    return [*cells, ("metadata", notebook.metadata)]


def differences(source: Path) -> list[str]:
    """How the built files differ from their source; empty when they do not."""
    found = []
    for student, target in targets(source).items():
        if not target.exists():
            found.append(f"{target.name}: not built")
            continue
        built = nbformat.read(target, as_version=4)
        name = f"{target.parent.name}/{target.name}"
        pairs = zip(skeleton(built), skeleton(assemble(source, student)), strict=False)
        if skeleton(built) != skeleton(assemble(source, student)):
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), "last")
            found.append(f"{name}: differs from its source from cell {first} on")
        code = [cell for cell in built.cells if cell.cell_type == "code"]
        if any((cell.execution_count is None) != student or (student and cell.outputs) for cell in code):
            found.append(f"{name}: {'holds outputs' if student else 'was not executed to its end'}")
    return found


def chosen(paths: Iterable[Path], only: list[str]) -> list[Path]:
    """Those of the paths whose name was asked for, or its beginning; all when none was. Sorted."""
    return sorted(path for path in paths if path.stem.startswith(tuple(only) or ""))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("only", nargs="*", help="names, or beginnings of names, of notebooks")
    parser.add_argument("--check", action="store_true", help="compare, build nothing")
    parser.add_argument("--force", action="store_true", help="build also what has not changed")
    parser.add_argument("--folder", type=Path, default=ROOT / "notebooks", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    sources = chosen(options.folder.glob("src/[0-9][0-9]_*.py"), options.only)
    stems = {source.stem for source in sources}
    built = [*options.folder.glob("*.ipynb"), *options.folder.glob("student/*.ipynb")]
    found = [f"{path.name}: has no source" for path in chosen(built, options.only) if path.stem not in stems]
    for source in sources:
        changed = differences(source)
        if options.check:
            found += changed
        elif changed or options.force:
            print(f"{source.stem}: ", end="", flush=True)
            print(build(source, options.force))
        else:
            print(f"{source.stem}: up to date")
    for line in found:
        print(line, file=sys.stderr)
    if options.check and found:
        print("The built notebooks are not those of the sources: make notebooks", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""What every notebook must keep to: rules read off its source and its outputs.

Each function returns what it found wrong, one line each; an empty list is a pass.
"""

import ast
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from nbformat import NotebookNode

from tools.course import build as notebooks

CELL_LINES, FUNCTION_LINES, WIDTH, ALT_LETTERS = 25, 20, 120, 20
SECONDS, MEGABYTES = 120, 5
# For cells that the reader sees, and for the part before the recap:
SEEN_LINES, SEEN_WIDTH, SEEN_ASSERTS, CORE_WORDS, FIRST_WORDS, FIRST_CELLS = 15, 88, 3, 1600, 150, 3
LATE_FIGURES = ("11", "12")  # their first figure may come after 300 words
TAGS = {"setup", "exercise", "exercise-test", "wrong-answers", "network", "nbval-ignore-output", "check", "plot"}
UNSEEN = {"setup", "wrong-answers", "check", "plot"}
QUESTION = re.compile(r"\*\*[^*]*\?\*\*")
WRONG = re.compile(r"^### WRONG: *(.+)$", re.M)
MACHINE = re.compile(r"(?<![\w.:/])(/(work|root|tmp|home|Users|opt|mnt|content|private|var)/[\w.]|[A-Z]:\\\\?Users)")
EXERCISE = re.compile(r"^### Exercise (\d+): .+ \(difficulty [1-5] of 5, \d+ minutes\)$", re.M)
NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")
NETWORK = {"aiohttp", "ftplib", "gdown", "http", "httpx", "huggingface_hub", "requests", "socket", "urllib", "wget"}
GLOBAL_SEEDS = {
    "torch.manual_seed",
    "torch.cuda.manual_seed_all",
    "np.random.seed",
    "random.seed",
    "transformers.set_seed",
}
DRAWS = {f"torch.{name}" for name in ("rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli")}
UNSEEDABLE = {"torch.rand_like", "torch.randn_like", "torch.randint_like"}


def source_problems(source: Path) -> list[str]:
    """Rules that need nothing run."""
    cells = notebooks.read(source).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    found = [*_head(cells), *_parts(cells), *_core(cells, source.stem)]
    found += [*_equations(text), *_exercises(cells), *_widgets(cells)]
    for index, cell in enumerate(cells):
        rules = [_paths(cell), _tags(cell)]
        if cell.cell_type == "code" and "setup" not in notebooks.tags(cell):
            rules += [_alt(cell), _code(cell)]
        found += [f"cell {index}: {problem}" for problem in itertools.chain(*rules)]
    return found


def core(cells: list[NotebookNode]) -> list[NotebookNode]:
    """The cells before the recap."""
    end = next((i for i, cell in enumerate(cells) if cell.source.startswith("## Recap")), len(cells))
    return cells[:end]


def prose(cells: Iterable[NotebookNode]) -> int:
    """Words of text, without formulas, code, folds and comments."""
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    text = re.sub(r"<details>.*?</details>|```.*?```|<!--.*?-->|\$\$.*?\$\$|\$[^$]*\$", " ", text, flags=re.S)
    return len(re.findall(r"[^\W\d_][\w'-]*", text))


def seen(cells: Iterable[NotebookNode]) -> list[NotebookNode]:
    """The code cells that a reader sees unfolded."""
    return [cell for cell in cells if cell.cell_type == "code" and not notebooks.tags(cell) & UNSEEN]


def before_figure(cells: list[NotebookNode]) -> list[NotebookNode]:
    """The cells before the first figure; of the head, title and question only."""
    first = next((i for i, cell in enumerate(cells) if notebooks.alts(cell)), len(cells))
    head = NotebookNode({**cells[0], "source": re.split(r"<!-- badge|\*\*Goals", cells[0].source)[0]})
    return [head, *cells[1:first]]


def _parts(cells: list[NotebookNode]) -> Iterator[str]:
    """The order of the parts, and what the last of them hold."""
    starts = ["## Recap", "## Exercises", "## Deeper"]
    at = [next((i for i, c in enumerate(cells) if c.source.startswith(start)), None) for start in starts]
    places = [i for i in at if i is not None]
    if at[0] is None or at[1] is None or "## Not shown" not in cells[-1].source or places != sorted(places):
        yield "order: cells begin with ## Recap, ## Exercises, ## Deeper: ..., and the last has ## Not shown"
    if at[0] is not None and len(re.findall(r"^- ", cells[at[0]].source, re.M)) != 5:
        yield "recap: five lines, each beginning with a dash"
    if "](http" not in cells[-1].source.partition("## Further reading")[2]:
        yield "tail: ## Further reading is missing, or has no link"
    if not any(re.search(r"^#+ .*goes? wrong", c.source, re.M) for c in cells if c.cell_type == "markdown"):
        yield "no failure case: show one under a heading with the words 'goes wrong'"


def _core(cells: list[NotebookNode], name: str) -> Iterator[str]:
    """What would lose a reader: too many words, a late figure, checks in the way, questions without an answer."""
    words, first = prose(core(cells)), before_figure(cells)
    if words > CORE_WORDS:
        yield f"the core has {words} words, more than {CORE_WORDS}"
    most = 2 * FIRST_WORDS if name.startswith(LATE_FIGURES) else FIRST_WORDS
    if prose(first) > most or len(seen(first)) > FIRST_CELLS:
        before = f"{prose(first)} words and {len(seen(first))} cells"
        yield f"{before} come before the first figure, more than {most} and {FIRST_CELLS}"
    asserts = sum(len(re.findall(r"^\s*assert\b", cell.source, re.M)) for cell in seen(cells) if not _tested(cell))
    if asserts > SEEN_ASSERTS:
        yield f"{asserts} asserts in cells that the reader sees, more than {SEEN_ASSERTS}: tag cells `check`"
    for index, question, answered in questions(cells):
        if not answered:
            yield f"cell {index}: the question {question} has no answer in a fold below it"
    for index, cell in enumerate(cells):
        yield from (f"cell {index}: {problem}" for problem in _read(cell, index))


def _told(cell: NotebookNode) -> bool:
    return cell.cell_type == "markdown" and "### Exercise" not in cell.source


def _tested(cell: NotebookNode) -> bool:
    return bool(notebooks.tags(cell) & {"exercise", "exercise-test"})


def questions(cells: list[NotebookNode]) -> Iterator[tuple[int, str, bool]]:
    """Each bold question to the reader: its cell, itself, and whether a fold answers it there or soon below."""
    told = {index: cell.source for index, cell in enumerate(cells) if index and _told(cell)}
    for index, source in told.items():
        later = "".join(told.get(i, "") for i in range(index + 1, index + 6))
        text = re.sub(r"<details>.*?</details>", "<details>", source, flags=re.S)
        for question in QUESTION.finditer(text):
            yield index, question[0], "<details>" in text[question.end() :] + later


def _read(cell: NotebookNode, index: int) -> Iterator[str]:
    """What a reader would stumble on in a cell."""
    lines = cell.source.splitlines()
    if cell in seen([cell]) and not _tested(cell) and len(lines) > SEEN_LINES:
        yield f"has {len(lines)} lines, more than {SEEN_LINES}"
    if cell in seen([cell]) and max(map(len, lines), default=0) > SEEN_WIDTH:
        yield f"has a line of more than {SEEN_WIDTH} characters"
    if index and _told(cell) and re.search(r"(?<!\[)\b[Nn]otebook \d\d\b", cell.source):
        yield "a mention of another notebook is a link: [notebook 04](04_ode_to_sde.ipynb)"


def _head(cells: list[NotebookNode]) -> Iterator[str]:
    head = cells[0].source if cells and cells[0].cell_type == "markdown" else ""
    if not head.startswith("# "):
        yield "head: the first cell must be Markdown and begin with the title"
    for part in ("**Question.**", "**Goals.**", "**Prerequisites.**", "**Time.**", notebooks.BADGE, notebooks.MEASURED):
        if part not in head:
            yield f"head: {part} is missing"
    goals = re.search(r"\*\*Goals\.\*\*\n+((?:- .*\n?(?:  .*\n?)*)+)", head)
    if not goals or not 3 <= len(re.findall(r"^- ", goals[1], re.M)) <= 5:
        yield "head: list 3 to 5 goals under **Goals.**"
    setups = [index for index, cell in enumerate(cells) if "setup" in notebooks.tags(cell)]
    if setups != [1]:
        yield f"set-up: exactly one cell, the second, is tagged setup; found at {setups}"
    elif any(line and not line.startswith("#") for line in cells[1].source.splitlines()):
        yield "set-up: the build writes this cell, leave it empty in the source"


def _equations(text: str) -> Iterator[str]:
    numbers = re.findall(r"\\tag\{(.+?)\}", text)
    if not numbers:
        yield "no equation is numbered: use \\tag{...}"
    for number in sorted({n for n in numbers if numbers.count(n) > 1}):
        yield f"equation number {number} is used twice"


def _exercises(cells: list[NotebookNode]) -> Iterator[str]:
    kinds = ["exercise", "exercise-test", "wrong-answers"]
    order = [(index, kind) for index, cell in enumerate(cells) for kind in kinds if kind in notebooks.tags(cell)]
    if [kind for _, kind in order] != kinds * (len(order) // 3):
        yield "exercises: each is three cells, tagged exercise, exercise-test and wrong-answers in this order"
        return
    if not 2 <= len(order) // 3 <= 4:
        yield f"exercises: 2 to 4 are wanted, found {len(order) // 3}"
    for number, (start, _) in enumerate(order[::3], 1):
        before = cells[start - 1].source
        heading = EXERCISE.search(before)
        if not heading or int(heading[1]) != number:
            yield f"exercise {number}: precede it by '### Exercise {number}: title (difficulty 2 of 5, 10 minutes)'"
        if "<details><summary>Hint</summary>" not in before:
            yield f"exercise {number}: has no hint: <details><summary>Hint</summary>"
        marks = notebooks.SOLUTION.findall(cells[start].source)
        if not marks or not all(marks):
            yield f"exercise {number}: ### BEGIN SOLUTION and ### END SOLUTION go inside a function"
        if len(WRONG.findall(cells[order[3 * number - 1][0]].source)) < 2:
            yield f"exercise {number}: plant at least two wrong answers, each after a line '### WRONG: what is wrong'"


def _widgets(cells: list[NotebookNode]) -> Iterator[str]:
    calls = re.findall(r"\binteract(?:ive|ive_output|_manual)?\(", "\n".join(c.source for c in cells))
    if len(calls) > 1:
        yield f"widgets: one at most, found {len(calls)}"


def _paths(cell: NotebookNode) -> Iterator[str]:
    for match in MACHINE.finditer(cell.source):
        yield f"machine path {match[0]}"


def _tags(cell: NotebookNode) -> Iterator[str]:
    unknown = notebooks.tags(cell) - TAGS
    if unknown:
        yield f"unknown tags {sorted(unknown)}; known are {sorted(TAGS)}"


def _alt(cell: NotebookNode) -> Iterator[str]:
    texts = notebooks.alts(cell)
    if ("plt.show()" in cell.source) != bool(texts):
        yield 'plt.show() and alternative text go together: # %% alt="what the figure shows"'
    if any(len(text.strip()) < ALT_LETTERS for text in texts):
        yield f"alt should say what the figure shows, in a sentence or two; got {texts}"


def _code(cell: NotebookNode) -> Iterator[str]:
    try:
        tree = ast.parse(cell.source)
    except SyntaxError as error:
        yield f"is not plain Python (magics and shell lines are not used): {error}"
        return
    kind = notebooks.tags(cell)
    if "wrong-answers" not in kind and len(cell.source.splitlines()) > CELL_LINES:
        yield f"has {len(cell.source.splitlines())} lines, more than {CELL_LINES}"
    if max(map(len, cell.source.splitlines()), default=0) > WIDTH:
        yield f"has a line of more than {WIDTH} characters"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"function {node.name} has {lines} lines, more than {FUNCTION_LINES}"
        elif isinstance(node, ast.Import | ast.ImportFrom) and "network" not in kind:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                if name.split(".")[0] in NETWORK:
                    yield f"imports {name}: no network use outside cells tagged network"
        elif isinstance(node, ast.Call):
            yield from _call(node, kind)


def _call(node: ast.Call, kind: set[str]) -> Iterator[str]:
    name, options = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
    first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
    if name in GLOBAL_SEEDS:
        yield f"{name} sets a global seed: pass a generator"
    elif name in UNSEEDABLE or (name in DRAWS and "generator" not in options):
        yield f"{name} draws without a generator"
    elif name.endswith("from_pretrained") and re.fullmatch(r"[\w-]+/[\w.-]+", str(first)) and "network" not in kind:
        yield f"{name}({first!r}) downloads: only in a cell tagged network"


def built_problems(target: Path) -> list[str]:
    """Rules on what a built notebook shows."""
    notebook = notebooks.nbformat.read(target, as_version=4)
    found = []
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            found += [f"cell {index}: {problem}" for problem in _output(output)]
    measured = notebooks.MEASURED_LINE.search(notebook.cells[0].source)
    seconds = re.search(r"([\d.]+) s of CPU time", measured[0]) if measured else None
    if not seconds:
        found.append("head: nothing was measured")
    elif float(seconds[1]) > SECONDS:
        found.append(f"takes {seconds[1]} s, more than {SECONDS}")
    if target.stat().st_size > MEGABYTES * 2**20:
        found.append(f"is {target.stat().st_size / 2**20:.1f} MiB, more than {MEGABYTES}")
    return found


def _output(output: NotebookNode) -> Iterator[str]:
    data = output.get("data", {})
    if output.output_type == "error":
        yield f"raises {output.ename}"
    if output.get("name") == "stderr" and output.text.strip():
        yield f"writes to stderr (a warning?): {output.text.strip().splitlines()[-1]}"
    images = re.findall(r"<img [^>]*>", data.get("text/html", ""))
    texts = [re.search(r'alt="([^"]*)"', image) for image in images]
    if not all(text and len(text[1]) >= ALT_LETTERS for text in texts) or (not images and "image/" in str(data.keys())):
        yield "shows an image without alt text"
    shown = words([output])
    for match in MACHINE.finditer(shown):
        yield f"shows a machine path {match[0]}"
    if re.search(r"\bat 0x[0-9a-f]{6,}", shown):
        yield "shows an object's address"


def words(outputs: Iterable[NotebookNode]) -> str:
    """What outputs say in words: printed text and values; of a figure that it is one; not progress bars."""
    parts = []
    for output in filter(notebooks.lasting, outputs):
        data = output.get("data", {})
        parts.append(" figure " if "image/png" in data else output.get("text") or data.get("text/plain", ""))
    return " ".join("".join(parts).split())


def matches(now: str, before: str, kind: Iterable[str] = ()) -> bool:
    """The same words, and numbers that agree to 5 % or 0.001: processors differ in the last digits of a sum."""
    if "nbval-ignore-output" in kind:
        return True
    pairs = zip(NUMBER.findall(now), NUMBER.findall(before), strict=False)
    close = all(abs(float(a) - float(b)) <= max(1e-3, 0.05 * abs(float(b))) for a, b in pairs)
    return NUMBER.sub("#", now) == NUMBER.sub("#", before) and close


def difference(now: str, before: str, kind: Iterable[str] = ()) -> str:
    """Where two sayings first differ, with the words around; empty when they match."""
    if matches(now, before, kind):
        return ""
    words = now.split(), before.split()
    first = next((i for i, pair in enumerate(zip(*words, strict=False)) if not matches(*pair)), min(map(len, words)))
    here, there = (" ".join(part[max(0, first - 5) : first + 6]) for part in words)
    return f"says '{here}', was '{there}'"

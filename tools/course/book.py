"""Lay out the sources of the book in build/book/source: the notebooks, the pages of book/, and what is generated.

    python -m tools.course.book [FOLDER]

Files keep the places they have in the repository, so a link between two of them works in the book as it does there. A
link to a file that is no page of the book becomes its address in the repository. `make book` calls this, then Sphinx.
"""

import argparse
import ast
import base64
import inspect
import re
import shutil
import string
import sys
from pathlib import Path, PurePosixPath

import nbformat
from nbformat import NotebookNode
from pdoc.docstrings import google

from tools.course import build as notebooks
from tools.runs import bench, tables

ROOT = notebooks.ROOT
PAGES = [
    *("BENCH.md", "CONTRIBUTING.md", "CHANGELOG.md", "flowscale_lite/README.md"),
    *("data/results/README.md", "data/tiny-flux/README.md"),
]
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]")
CODE = r"```.*?```|`[^`]*`|"  # is left as it is
LINK = re.compile(CODE + r"(?<=\]\()(?!\w+:)([^)\s#]*)(#[^)\s]*)?(?=\))", re.S)
EQUATION = re.compile(r"\$\$((?:(?!\$\$).)+?)\\tag\{(\d+\.\d+)\}\s*\$\$", re.S)
REFERENCE = re.compile(CODE + r"(?<![\w\[])\((\d+\.\d+)\)", re.S)
HEADING = re.compile(r"^#+ +(.+)$", re.M)
ARXIV = re.compile(r"arXiv[ :](\d{4}\.\d{5})")
PICTURE = re.compile(r'<img (?=alt="[^"]*" src="data:image/png;base64,([^"]{40}))')


def slug(heading: str) -> str:
    """The anchor that Sphinx gives a heading: its words in lower case, joined by dashes."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


class Book:
    """What the pages of the book need to know of one another."""

    def __init__(self, out: Path):
        about = notebooks.project()
        self.out, self.address = out, f"{about['repository']}/blob/v{about['version']}/"
        self.paths = sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))
        self.notebooks = {path.stem: nbformat.read(path, as_version=4) for path in self.paths}
        self.about = about
        self.generated = {"book/equations.md": equations, "book/bibliography.md": bibliography}
        self.generated |= {"book/status.md": status, "api/index.md": api_index}
        self.written = [*PAGES, *(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("book/*.md")))]
        self.pages = {*self.written, *self.generated, *(f"api/{module(path)}.md" for path in api_modules())}
        self.pages |= {"book/cheat_sheet.pdf", *(f"notebooks/{name}.ipynb" for name in self.notebooks)}
        self.tags = {tag: target for tag, target, _ in self.equations()}

    def equations(self) -> list[tuple[str, str, str]]:
        """Every numbered equation: its number, the link to the section it stands in, its formula."""
        found = []
        for name, notebook in self.notebooks.items():
            heading = ""
            for cell in notebook.cells:
                parts = re.split(r"^(?=#+ )", cell.source, flags=re.M) if cell.cell_type == "markdown" else []
                for part in parts:
                    first = HEADING.match(part)
                    heading = first[1] if first else heading
                    target = f"../notebooks/{name}.ipynb#{slug(heading)}"
                    found += [(tag, target, " ".join(formula.split())) for formula, tag in EQUATION.findall(part)]
        return found

    def linked(self, text: str, page: str) -> str:
        """The text of a page with every link to a page of the book, or else to the repository."""

        def mended(match: re.Match[str]) -> str:
            if match[1] is None:
                return match[0]
            target, anchor = match[1], match[2] or ""
            where = PurePosixPath(page).parent / target
            path = re.sub(r"[^/]+/\.\./", "", where.as_posix()) if target else page
            if path in self.pages:
                return target + (f"#{slug(anchor[1:].replace('-', ' '))}" if anchor else "")
            if not (ROOT / path).exists() and not (self.out / path).exists():
                raise ValueError(f"{page}: the link to {target} leads nowhere")
            return target if (self.out / path).exists() else self.address + path + anchor

        return LINK.sub(mended, text)

    def cited(self, text: str, page: str) -> str:
        """The text with every (4.6) a link to the notebook that derives it."""

        def link(match: re.Match[str]) -> str:
            if match[1] is None:
                return match[0]
            if match[1] not in self.tags:
                raise ValueError(f"{page}: no notebook has an equation ({match[1]})")
            return f"[({match[1]})]({self.tags[match[1]]})"

        return REFERENCE.sub(link, text)

    def write(self, page: str, text: str) -> None:
        path = self.out / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def lay_out(self) -> None:
        """All sources of the book."""
        for name in ("_config.yml", "_toc.yml"):
            text = (ROOT / "book" / name).read_text(encoding="utf-8")
            self.write(name, string.Template(text).safe_substitute(self.about))
        shutil.copytree(ROOT / "book" / "_static", self.out / "_static", dirs_exist_ok=True)
        shutil.copytree(ROOT / "data" / "pictures", self.out / "data" / "pictures", dirs_exist_ok=True)
        for name, notebook in self.notebooks.items():
            page = f"notebooks/{name}.ipynb"
            self.write(page, nbformat.writes(self.chapter(notebook, page)))
        for path in api_modules():
            self.write(f"api/{module(path)}.md", api_page(path))
        for page, make in self.generated.items():
            self.write(page, self.linked(make(self), page))
        for page in self.written:
            text = (ROOT / page).read_text(encoding="utf-8")
            self.write(page, self.linked(self.cited(text, page) if page.startswith("book/") else text, page))
        rows = bench.experiments.read(bench.PATH)
        tables.insert(self.out / "BENCH.md", "bench", bench.table(rows))

    def chapter(self, notebook: NotebookNode, page: str) -> NotebookNode:
        """A notebook as a page: the badge a plain link, no set-up, links and pictures as the book has them."""
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                text = EQUATION.sub(enclosed, BADGE.sub("[Open in Colab]", cell.source))
                cell.source = self.linked(text, page)
            elif "setup" in notebooks.tags(cell):
                cell.metadata["tags"] = [*cell.metadata["tags"], "remove-cell"]
            for output in cell.get("outputs", []):
                if "text/html" in output.get("data", {}):
                    output["data"]["text/html"] = PICTURE.sub(legible, output["data"]["text/html"])
        return notebook


def legible(picture: re.Match[str]) -> str:
    """A picture that keeps six tenths of its width on a phone, where it moves sideways: smaller, no letter is read."""
    width = int.from_bytes(base64.b64decode(picture[1])[16:20], "big")
    return f'{picture[0]}style="min-width: {round(0.6 * width)}px" '


def enclosed(equation: re.Match[str]) -> str:
    """A numbered equation of several lines as an environment: Sphinx would put it into one that takes no number."""
    if r"\\" not in equation[1]:
        return equation[0]
    return f"\\begin{{equation*}}\n{equation[1].strip()} \\tag{{{equation[2]}}}\n\\end{{equation*}}"


def title(notebook: NotebookNode) -> str:
    return notebook.cells[0].source.splitlines()[0].removeprefix("# ")


def equations(book: Book) -> str:
    """The page of all numbered equations."""
    text = "# All numbered equations\n\nEach number leads to the section of the notebook that derives the formula.\n"
    chapter = ""
    for tag, target, formula in book.equations():
        name = PurePosixPath(target.partition("#")[0]).stem
        if name != chapter:
            chapter, text = name, text + f"\n## {title(book.notebooks[name])}\n"
        text += f"\n[({tag})]({target})\n\n$${formula}$$\n"
    return text


def bibliography(book: Book) -> str:
    """The page of all works that the notebooks send their readers to, by the address, with the notebooks."""
    works: dict[str, str] = {}
    readers: dict[str, list[str]] = {}
    for name, notebook in book.notebooks.items():
        text = notebook.cells[-1].source.partition("## Further reading")[2]
        for entry in re.split(r"\n- |; (?=[A-Z])", text):
            for address in re.findall(r"\]\((http[^)]+)\)", entry):
                said = re.split(r"(?<=\d{4}): | \(SVDD\)", entry.strip(" -\n"))[0]
                works[address] = max(works.get(address, ""), said, key=len)
                readers.setdefault(address, []).append(f"[{name[:2]}](../notebooks/{name}.ipynb)")
    lines = {said: readers[address] for address, said in sorted(works.items(), key=lambda work: work[1].lstrip("["))}
    entries = "\n".join(f"- {said}. *Notebook {', '.join(where)}*" for said, where in lines.items())
    return f"# Bibliography\n\nThe works that the notebooks name, and the notebooks that name them.\n\n{entries}\n"


def status(book: Book) -> str:
    """The page of the last run of every notebook, and of the versions that they ran with."""
    lines = ["| notebook | last run | CPU time | memory |", "|---|---|---|---|"]
    for name, notebook in book.notebooks.items():
        line = notebooks.MEASURED_LINE.search(notebook.cells[0].source)
        run = re.search(r"(\d{4}-\d\d-\d\d).*?: (\d+ s) .*?, (\d+ MB)", line[0] if line else "")
        cells = run.groups() if run else ("not measured", "", "")
        lines.append(f"| [{title(notebook)}](../notebooks/{name}.ipynb) | {' | '.join(cells)} |")
    runs = "\n".join(lines)
    pins = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    versions = "\n".join(f"| {name} | {version} |" for name, version in pins)
    return f"""# Status

Every notebook was run from its first cell to its last when it was built, on one CPU thread. Time and memory are those
of its kernel.

{runs}

## Versions

flowscale_lite {book.about["version"]}, and these, which the repository pins for its own tests:

| library | version |
|---|---|
{versions}
"""


def api_modules() -> list[Path]:
    """The package's modules in the order of the tour, those that only gather others left out."""
    paths = [path for path in (ROOT / "flowscale_lite").rglob("*.py") if not path.stem.startswith("_")]
    return sorted(paths, key=lambda path: (len(path.relative_to(ROOT).parts), path))


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def api_index(book: Book) -> str:
    """The page that lists the modules."""
    lines = [f"| [`{module(p)}`]({module(p)}.md) | {summary(ast.parse(p.read_text()))} |" for p in api_modules()]
    return (
        "# API reference\n\nMade from the docstrings. `(K, *D)` is the shape of a batch of K samples of shape D.\n\n"
        "| module | what it holds |\n|---|---|\n" + "\n".join(lines) + "\n"
    )


def summary(node: ast.Module) -> str:
    return (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def described(docstring: str | None) -> str:
    """A docstring as Markdown: its sections as lists, arXiv's numbers as links."""
    text = google(inspect.cleandoc(docstring or ""))
    text = re.sub(r"\n+#+ (\w+):\n", r"\n\n**\1**\n\n", text)
    text = re.sub(r"^ - \*\*([^*]+):\*\* +", r"- `\1`: ", text, flags=re.M)
    text = re.sub(r"(?<=[.\n])[ \n](?=Raises \w+)", "\n\n", text)
    return ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def directive(kind: str, what: str, body: str, depth: int, *options: str) -> str:
    fence = ":" * (6 - depth)
    return "\n".join([f"{fence}{{py:{kind}}} {what}", *options, "", body, fence, ""])


def api_page(path: Path) -> str:
    """The page of one module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    head = f"# {module(path).removeprefix('flowscale_lite.')}\n\n```{{py:module}} {module(path)}\n```\n\n"
    return head + described(ast.get_docstring(tree)) + "\n\n" + "\n".join(members(tree.body))


def members(body: list[ast.stmt], depth: int = 0) -> list[str]:
    """The public names of a module or a class that have a docstring, as directives of Sphinx."""
    found = []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            inner = described(ast.get_docstring(node)) + "\n\n" + "\n".join(members(node.body, depth + 1))
            found.append(directive("class", node.name + arguments(node), inner, depth))
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and ast.get_docstring(node):
            found.append(function(node, depth))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(after, ast.Expr) and not depth:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            text = getattr(after.value, "value", None)
            if isinstance(target, ast.Name) and isinstance(text, str):
                found.append(directive("data", target.id, described(text), depth))
    return found


def function(node: ast.FunctionDef, depth: int) -> str:
    marks = {ast.unparse(mark) for mark in node.decorator_list}
    given = ast.unparse(node.args)
    if depth and "staticmethod" not in marks:
        given = given.partition(", ")[2]  # without self
    kind = "function" if not depth else "property" if "property" in marks else "method"
    options = [f":{mark}:" for mark in ("classmethod", "staticmethod") if mark in marks]
    answer = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    what = node.name if kind == "property" else f"{node.name}({given}){answer}"
    return directive(kind, what, described(ast.get_docstring(node)), depth, *options)


def arguments(node: ast.ClassDef) -> str:
    """How an object of the class is made: a dataclass by its fields, any other by its __init__."""
    if any("dataclass" in ast.unparse(mark) for mark in node.decorator_list):
        fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        return "(" + ", ".join(ast.unparse(field) for field in fields) + ")"
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
            return f"({ast.unparse(inner.args).partition(', ')[2]})"
    return ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "book" / "source")
    options = parser.parse_args(argv)
    shutil.rmtree(options.folder, ignore_errors=True)
    Book(options.folder).lay_out()
    return 0


if __name__ == "__main__":
    sys.exit(main())

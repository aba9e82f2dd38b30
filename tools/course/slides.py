"""Slides of the notebooks' cores, with reveal.js: build/slides/NN_name.html.

    python -m tools.course.slides [--js NODE_MODULES] [03 05 ...]

A rule cuts them, nobody's hand. A heading of the second level begins a slide to the right; what follows stands below
it, as much to a slide as its room allows. A figure has a slide of its own, without the code that draws it. Code that
the reader sees is shown. Set-up, checks and all that comes after the recap are left out.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tools.course import build as notebooks
from tools.course import rules

ROOM = 85  # words on a slide
FORMULA, LINE = 18, 6  # the room of a displayed formula and of a line of a list, a table or code, in words
BLOCK = re.compile(r"<details>.*?</details>|```.*?```|\$\$.*?\$\$[.,]?|(?:(?!\n\n).)+", re.S)
LEFT_OUT = re.compile(r"<!--.*$|\[!\[Open in Colab\].*$", re.M)
LINK = re.compile(r"\[([^\]]*)\]\((?!http)[^)]*\)")  # to another notebook or section, which is no slide


def room(block: str) -> int:
    """How much of a slide a block of Markdown takes, in words; a fold takes its question only."""
    if block.startswith("<details>"):
        return LINE
    if block.startswith("$$"):
        return FORMULA + LINE * block.count("\\\\")
    lines = len(re.findall(r"^(?:[-*|]|\d+\.|    )", block, re.M)) if not block.startswith("```") else block.count("\n")
    return max(len(re.sub(r"\$[^$]*\$|\]\([^)]*\)", " x ", block).split()), LINE * lines)


def slides_of(text: str, heading: str) -> Iterator[tuple[str, str, str]]:
    """A Markdown cell as slides: the kind, the heading, the text."""
    for part in re.split(r"^(?=#{1,3} )", LINK.sub(r"\1", LEFT_OUT.sub("", text)), flags=re.M):
        title, kind = re.match(r"(#{1,3}) (.+)\n*", part), "subslide"
        if title:
            part, heading, kind = part[title.end() :], title[2], "subslide" if title[1] == "###" else "slide"
        held: list[str] = []
        for block in BLOCK.findall(part):
            if held and sum(map(room, held)) + room(block) > ROOM:
                yield kind, heading, "\n\n".join(held)
                held, kind = [], "subslide"
            held.append(block.strip("\n"))
        if held or title:
            yield kind, heading, "\n\n".join(held)


def deck(notebook: NotebookNode) -> NotebookNode:
    """The slides of a built notebook, as a notebook with slide tags."""
    cells: list[NotebookNode] = []
    heading = ""
    after = next((i for i, c in enumerate(notebook.cells) if c.source.startswith("## Recap")), len(notebook.cells))

    def add(cell: NotebookNode, kind: str) -> None:
        cell.metadata["slideshow"] = {"slide_type": kind}
        cells.append(cell)

    for cell in notebook.cells[: after + 1]:
        if cell.cell_type == "markdown":
            for kind, heading, text in slides_of(cell.source, heading):  # noqa: B020 - the next cell goes on below it
                mark = "#" if not cells else "##"
                add(new_markdown_cell(f"{mark} {heading}\n\n{text}"), kind)
            continue
        figures = [out.data["text/html"] for out in cell.outputs if "image/png" in out.get("data", {})]
        others = [out for out in cell.outputs if "image/png" not in out.get("data", {})]
        if not notebooks.tags(cell) & rules.UNSEEN:
            add(new_code_cell(cell.source, outputs=others), "subslide")
        for figure in figures:
            add(new_markdown_cell(figure), "subslide")
    return new_notebook(cells=cells, metadata=notebook.metadata)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("only", nargs="*", help="names, or beginnings of names, of notebooks")
    parser.add_argument("--js", type=Path, default=notebooks.ROOT / ".venv" / "book" / "node_modules")
    parser.add_argument("--out", type=Path, default=notebooks.ROOT / "build" / "slides")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(options.js / "reveal.js" / "dist", options.out / "reveal" / "dist", dirs_exist_ok=True)
    (options.out / "mathjax").mkdir(exist_ok=True)
    shutil.copy(options.js / "mathjax" / "es5" / "tex-svg-full.js", options.out / "mathjax")
    folder = notebooks.ROOT / "book"
    exporter = SlidesExporter(template_name="slides", extra_template_basedirs=[str(folder)], reveal_url_prefix="reveal")
    exporter.reveal_theme = "white"
    for path in notebooks.chosen(notebooks.ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"), options.only):
        slides = deck(nbformat.read(path, as_version=4))
        text, _ = exporter.from_notebook_node(slides, {"metadata": {"name": path.stem}})
        (options.out / f"{path.stem}.html").write_text(text, encoding="utf-8")
        print(f"{path.stem}: {len(slides.cells)} slides")
    print(f"The slides: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

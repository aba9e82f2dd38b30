"""The cheat sheet as a printable PDF, by pandoc and Typst, which the book's environment holds.

python tools/course/sheet.py book/cheat_sheet.md OUT.pdf
"""

import re
import sys
from pathlib import Path

import pypandoc
import typst

LOOK = """\
#set page(paper: "a4", margin: 1.4cm, numbering: none)
#set text(size: 9.2pt)
#set table(inset: (x: 4pt, y: 3pt), stroke: none)
#show figure: set block(breakable: true)
#show table.cell: set par(justify: false)
#show heading.where(level: 1): set text(size: 15pt)
#show heading.where(level: 2): set text(size: 10.5pt)
"""


def main(page: str, out: str) -> None:
    text = re.sub(r"^\[.*\]\(.*\)\n", "", Path(page).read_text(encoding="utf-8"), flags=re.M)  # the link to the PDF
    body = pypandoc.convert_text(text, "typst", format="markdown-citations+pipe_tables+tex_math_dollars")
    source = Path(out).with_suffix(".typ")
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(LOOK + body, encoding="utf-8")
    Path(out).write_bytes(typst.compile(str(source)))


if __name__ == "__main__":
    main(*sys.argv[1:])

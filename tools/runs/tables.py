"""Tables of runs as Markdown, and where pages keep them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd


def markdown(table: pd.DataFrame) -> str:
    """The columns of a table; its index is left out, so make it columns first (`reset_index`) where it says something.

    pandas has `to_markdown`, which needs one more package.
    """
    lines = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False, name=None)]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def insert(page: Path, name: str, text: str) -> None:
    """Put text between the page's `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: the page lacks the marks.
    """
    before, mark, rest = page.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not mark or not end:
        raise ValueError(f"{page} has no <!-- {name} --> ... <!-- /{name} --> to write between")
    page.write_text(before + mark + text.rstrip() + "\n" + end + after)

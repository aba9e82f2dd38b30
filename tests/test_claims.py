"""Claims are as wide as the rows behind them, and no wider."""

import re
from pathlib import Path

import pytest

from flowscale_lite import experiments
from tools.runs import toy_table

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "BENCH.md", ROOT / "data/results/README.md", ROOT / "flowscale_lite/README.md"]
PAGES += sorted(ROOT.glob("notebooks/src/*.py"))
# What no finite table of runs shows.
TOO_WIDE = re.compile(
    r"\bnever (?:behind|worse|loses)\b|\balways (?:ahead|better|wins|best)\b|\blevel with it,? everywhere\b"
    r"|\b(?:ahead|better) everywhere\b|\bbeats (?:every|all) other",
    re.I,
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_claim_is_wider_than_any_rows(page):
    text = re.sub(r"\s+", " ", page.read_text(encoding="utf-8"))
    assert [match[0] for match in TOO_WIDE.finditer(text)] == []


@pytest.mark.parametrize(
    "text", ["RBF is never behind SVDD", "ahead of every other method or level with it, everywhere", "always better"]
)
def test_wide_claims_are_recognised(text):
    assert TOO_WIDE.search(text)


def test_where_rbf_is_behind_svdd_is_told():
    """The table on the page is that of the rows, all of them, and it has a line where the interval is below zero."""
    rows = experiments.read(toy_table.AWAY)
    assert len(rows) == len(toy_table.away())
    table = toy_table.away_table(rows)
    assert table in (ROOT / "data/results/README.md").read_text(encoding="utf-8")
    behind = [line for line in table.splitlines() if re.search(r"-0\.\d+ \[-0\.\d+, -0\.\d+\] \|$", line)]
    assert [line.split(" | ")[:2] for line in behind] == [["| 1000", "VP-SDE, long last step"]]  # same chain and noises
    assert re.search(r"-0\.\d+ \[-0\.\d+, -0\.\d+\] \| ", table)  # SVDD with two chains


def test_what_the_page_says_of_the_toy_is_what_its_rows_say():
    """RBF's default is first of all methods but RBF's own options, smooth reward, at both budgets, on both flows."""
    rows = [row for row in experiments.read(toy_table.PATH) if row["reward"] == "smooth"]
    for world in ("exact", "distilled"):
        for budget in toy_table.BUDGETS:
            cell = [row for row in rows if (row["world"], row["budget"]) == (world, budget)]
            means: dict = {}
            for row in cell:
                means.setdefault((row["method"], row["kernel"]), []).append(row["found"])
            best = {method: max(sum(v) / len(v) for (m, _), v in means.items() if m == method) for method, _ in means}
            assert best["RBF"] == max(value for method, value in best.items() if not method.startswith("RBF,"))


PAIRS = [
    ("few-step", "rbf", 50, "svdd", 50),
    ("few-step", "rbf", 100, "svdd", 100),
    ("few-step", "rbf", 250, "svdd", 250),
    ("few-step", "rbf", 500, "svdd", 500),
    ("few-step", "rbf", 250, "zero-order", 250),
    ("few-step", "rbf", 250, "best-of-n, 4 steps", 500),
    ("few-step", "refine", 100, "rbf", 100),
    ("few-step", "refine", 100, "best-of-n, 4 steps", 500),
    ("few-step", "refine", 50, "best-of-n, 4 steps", 500),
    ("multi-step", "refine", 250, "best-of-n", 250),
    ("multi-step", "beam", 250, "best-of-n", 250),
    ("compose", "refine", 100, "best-of-n", 100),
    ("differentiable", "svdd + dps", 100, "svdd", 100),
]


@pytest.mark.parametrize(("track", "first", "mine", "second", "theirs"), PAIRS)
def test_the_differences_on_the_bench_page_are_those_of_its_rows(track, first, mine, second, theirs):
    rows = [row for row in experiments.read(ROOT / "data/results/bench.jsonl") if row["track"] == track]
    page = re.sub(r"\s+", " ", (ROOT / "BENCH.md").read_text(encoding="utf-8"))
    one, other = (
        [row for row in rows if (row["method"], row["budget"]) == pair] for pair in ((first, mine), (second, theirs))
    )
    for judge in ("exact", "held_out"):
        said = str(experiments.paired_difference(one, other, judge)).replace("0.", ".")
        assert (said if said.startswith("-") else f"+{said}") in page, said

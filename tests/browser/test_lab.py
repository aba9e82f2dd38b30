"""JupyterLab as a reader sees it: notebook 00 run, its widget moved, an exercise done wrong and right, and a notebook
that JupyterLab does not trust."""

import re
from pathlib import Path

import nbformat
import pytest

from tools.course import build as notebooks

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "notebooks" / "src" / "00_start.py"
MINUTES = 60_000


def opened(browser, lab, name):
    """A page with this notebook alone, in a workspace of its own: JupyterLab opens again what one had open before."""
    page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
    page.goto(f"{lab}/lab/workspaces/{name}/tree/notebooks/{name}.ipynb", timeout=2 * MINUTES)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=2 * MINUTES)
    return page


@pytest.fixture(scope="module")
def start(browser, lab):
    """Notebook 00, all of its cells run."""
    page = opened(browser, lab, "00_start")
    page.wait_for_function("window.jupyterapp?.commands.isEnabled('notebook:run-all-cells')", timeout=MINUTES)
    # a JupyterLab without memory of the kernel asks for one; the notebook names it
    page.wait_for_function("jupyterapp.shell.currentWidget.sessionContext.session?.kernel", timeout=2 * MINUTES)
    page.set_default_timeout(10 * MINUTES)
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells').then(() => null)")
    yield page
    page.context.close()


def answers() -> tuple[str, str]:
    """A wrong answer to the first exercise of 00, and the right one."""
    cells = notebooks.read(SOURCE).cells
    right = next(cell.source for cell in cells if "exercise" in notebooks.tags(cell))
    wrong = next(cell.source for cell in cells if "wrong-answers" in notebooks.tags(cell))
    return re.split(r"^### WRONG:.*\n", wrong, flags=re.M)[1].strip(), notebooks.solution(right)


def test_notebook_00_runs_to_its_end(start):
    assert start.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert start.locator(".jp-CodeCell .jp-InputPrompt", has_text="[*]").count() == 0
    assert start.locator(".jp-OutputArea-output img").count() >= 10
    assert start.get_by_text("Not done yet.").count() >= 1


def test_the_widget_moves_the_figure(start):
    handle = start.locator(".jp-OutputArea .widget-slider .noUi-handle").first
    handle.scroll_into_view_if_needed()
    picture = start.locator(".jp-Cell", has=start.locator(".widget-slider")).locator("img").first
    before = picture.get_attribute("src")
    handle.focus()
    for _ in range(4):
        start.keyboard.press("ArrowLeft")
    start.wait_for_function(
        "before => [...document.querySelectorAll('.jp-Cell')].filter(c => c.querySelector('.widget-slider'))"
        ".some(c => c.querySelector('img') && c.querySelector('img').src !== before)",
        arg=before,
        timeout=MINUTES,
    )
    assert start.locator(".widget-readout").first.inner_text().strip() == "5"


def test_an_exercise_is_refused_gives_a_hint_and_is_accepted(start):
    wrong, right = answers()
    cell = start.locator(".jp-CodeCell", has_text="def tries_needed").first
    test = cell.locator("xpath=following-sibling::*[contains(@class, 'jp-CodeCell')][1]")  # folded

    def hand_in(code):
        cell.locator(".cm-content").click()
        start.keyboard.press("Control+A")
        start.keyboard.press("Delete")
        start.keyboard.insert_text(code)
        start.keyboard.press("Shift+Enter")  # runs the answer, and goes on to its test
        start.keyboard.press("Shift+Enter")

    hand_in(wrong)
    test.get_by_text("AssertionError").first.wait_for(timeout=MINUTES)
    hint = start.locator("details", has=start.locator("summary", has_text="Hint")).first
    hint.locator("summary").click()
    assert hint.locator("p").first.is_visible()
    hand_in(right)
    test.get_by_text("Well done.").first.wait_for(timeout=MINUTES)


@pytest.mark.parametrize("name", ["04_ode_to_sde", "08_rollover_budget_forcing"])
def test_figures_of_a_notebook_that_is_not_trusted(browser, lab, name):
    stored = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    figures = sum("<img" in output.get("data", {}).get("text/html", "") for cell in code for output in cell.outputs)
    page = opened(browser, lab, name)
    drawn = "[...document.querySelectorAll('.jp-OutputArea-output img')].filter(i => i.naturalWidth).length"
    for _ in range(60):
        if page.evaluate(drawn) >= figures:
            break
        page.wait_for_timeout(1000)
    assert page.evaluate(drawn) == figures
    # Jupyter trusts what holds nothing that could do harm, such as cells without outputs
    trusted = page.evaluate(
        "[...jupyterapp.shell.currentWidget.content.widgets]"
        ".filter(c => c.node.querySelector('.jp-OutputArea-output img')).filter(c => c.model.trusted).length"
    )
    assert figures > 5 and trusted == 0
    page.context.close()

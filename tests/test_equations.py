"""Numbers of equations, wherever they are cited: each is there, and outside its own notebook it is the one meant."""

import io
import re
import tokenize

import pytest
from test_notebooks import SOURCES, every_notebook

from tools.course import book
from tools.course import build as notebooks

CITED = re.compile(r"(?<![\w(\[])\(((?:\d|1[0-2])\.[1-9]\d?)\)")
PAGES = [
    *(notebooks.ROOT / "book" / f"{name}.md" for name in ("cheat_sheet", "symbols", "glossary", "index")),
    *sorted((notebooks.ROOT / "notebooks" / "instructor").glob("*.md")),
]
CELLS = {source: notebooks.read(source).cells for source in SOURCES}

# What the pages call an equation, and a piece of LaTeX that only the right one holds. Where several names stand in a
# table's row, an entry or a sentence, the longest is what the number belongs to; of two numbers, the longest two.
NAMES = {
    "reward": r"= -\sum_k (n_k(x) - n_k^*)^2",
    "| path |": r"x_t = (1 - t) x_0 + t \varepsilon",
    "a datum": r"x_t = (1 - t) x_0 + t \varepsilon",
    "the state at time": r"x_t = (1 - t) x_0 + t \varepsilon",
    "velocity": r"u_t(x) = E[\varepsilon - x_0 | x_t = x]",
    "step of the flow": "x_s = x_t + (s - t)",
    "the time that a step goes to": "x_s = x_t + (s - t)",
    "loss": r"L = E|u^\theta_t",
    "least squares on pairs": r"L = E|u^\theta_t",
    "two equations, two unknowns": r"x = (1 - t) x_{0|t} + t \varepsilon_{|t}",
    "averages of datum and noise": r"x = (1 - t) x_{0|t} + t \varepsilon_{|t}",
    "posterior mean": "x_{0|t} = x - t u_t(x)",
    "the guess of the datum": "x_{0|t} = x - t u_t(x)",
    "the guess of the noise": r"\varepsilon_{|t} = x + (1 - t) u_t(x)",
    "continuity equation": r"\partial_t p_t + \nabla",
    "density of the states at time": r"\partial_t p_t + \nabla",
    "how much of datum and noise": r"x_t = \alpha_t x_0 + \sigma_t \varepsilon",
    "how data and noise are mixed": r"x_t = \alpha_t x_0 + \sigma_t \varepsilon",
    "the same on any path": r"x_{0|t} = \frac{\sigma'_t x - \sigma_t u_t(x)}",
    "reflow": r"(\Phi(\varepsilon), \varepsilon)",
    "guidance": r"u^w = u_\varnothing + w",
    "look-ahead reward": "v_t(x_t) = r(x_{0|t})",
    "judge a state by its guess": "v_t(x_t) = r(x_{0|t})",
    "a quadratic reward": r"\frac12 \operatorname{tr}(H C_t)",
    "number of samples of best-of-N": r"E[\max_{i \le N} r_i]",
    "the best of $N$, on average": r"E[\max_{i \le N} r_i]",
    "fresh noise, drawn in a step": r"x_{\text{new}} = x + g \sqrt h z",
    "heat equation": r"= \frac12 g^2 \Delta p",
    "the pair (": r"\text{ cancel.}",
    "SDE": r"dx = [u_t - \frac12 g_t^2 \nabla \log p_t] dt + g_t dw",
    "diffusion coefficient": r"dx = [u_t - \frac12 g_t^2 \nabla \log p_t] dt + g_t dw",
    "noise, and the pull that pays for it": r"dx = [u_t - \frac12 g_t^2 \nabla \log p_t] dt + g_t dw",
    "the velocity contains it": r"\nabla \log p_t(x) = -\frac{\varepsilon_{|t}}{t}",
    "score": r"\nabla \log p_t(x) = -\frac{\varepsilon_{|t}}{t}",
    "the score, from the guess of the noise": r"\nabla \log p_t(x) = -\frac{\varepsilon_{|t}}{t}",
    "step of the SDE": r"x_s = x_t - (t - s) [u_t - \frac12",
    "one step of it": r"x_s = x_t - (t - s) [u_t - \frac12",
    "memoryless": r"g_t^2 = 2(\sigma_t \sigma_t'",
    "noise-to-signal ratio": r"\rho = \frac{\sigma_s \alpha_t}",
    "DDIM": r"x_s = \alpha_s x_{0|t} + \sqrt{\sigma_s^2 - std^2}",
    "DDPM transition": r"x_s = \alpha_s x_{0|t} + \sqrt{\sigma_s^2 - std^2}",
    "the DDPM transition ($\\eta = 1$) and DDIM": r"x_s = \alpha_s x_{0|t} + \sqrt{\sigma_s^2 - std^2}",
    "its noise": r"std = \eta \sigma_s \sqrt{1 - \rho^2}",
    "standard deviation of a transition's noise": r"std = \eta \sigma_s \sqrt{1 - \rho^2}",
    "the same of another path": r"\bar x_s = \bar\alpha_s x_0",
    "clock": r"t_s = \frac{\bar\sigma_s}",
    "scale": r"c_s = \bar\alpha_s + \bar\sigma_s",
    "up to clock and scale": r"\bar x_s = c_s x_{t_s}",
    "the averages are the same": r"E[x_0 | \bar x_s",
    "another diffusion coefficient": r"g_t^2 = \frac{\bar g_s^2}{c_s^2}",
    "VP-SDE on the linear path": r"g_t^2 = \frac{\bar g_s^2}{c_s^2}",
    "tilted": r"p_\tau(x) = \frac{1}{Z_\tau}",
    "temperature": r"p_\tau(x) = \frac{1}{Z_\tau}",
    "normalising constant": r"Z_\tau = E_{x \sim p_0}",
    "weight of particle": r"w_k = e^{r(x^k)/\tau}",
    "weights of particles": r"w_k = e^{r(x^k)/\tau}",
    "effective sample size": r"ESS = \frac{1}{\sum_k W_k^2}",
    "telescoping product": r"e^{f_1} e^{f_{t_1} - f_1} \cdots",
    "resampling": "E[n_k] = K W_k",
    "tempering": r"f_t(x) = \lambda_t \frac{v(x)}{\tau}",
    "the function `value`": r"f^*_t(x) = \log",
    "what a state is worth": r"V_t(x) = \tau \log E",
    "value": r"V_t(x) = \tau \log E",
    "the best rule": "q(x_s | x_t) = p(x_s | x_t) e^{(V_s",
    "quota": r"q = B - \lfloor",
    "the chance to fail": r"\frac{m}{m + n}",
    "the right push": r"\nabla_x \log E[e^{r(x_0)/\tau} | x_t = x]",
    "paired comparison": r"(a_{ps} - b_{ps})",
    "in pairs, with an interval": r"(a_{ps} - b_{ps})",
    "chance of a try": r"p_k = \frac{k}{n} q^k",
    "hungriest stage": r"peak = \max_{s}",
    "gradient through the look-ahead": r"J = \frac{\partial x_{0|t}}{\partial x}",
    "steering": r"\varepsilon_{|t}' = \frac{x - \alpha_t x_{0|t}'}",
    "memory at its peak": r"peak = \max_{s}",
    "seconds of a search": r"S = \frac{n F_v",
    "runs on $g$ gpus": r"T \le \frac{W}{g} + ",
    "smallest gain shown": r"1.96 \sqrt{d / n}",
}


def signs(latex: str) -> str:
    """A formula without what only spaces, sizes and breaks it."""
    latex = re.sub(r"\\(?:[bB]ig|quad|qquad|text|mathrm|times)(?![a-zA-Z])|\\[,;! \\]|[\s&{}]", "", latex)
    return latex.replace(r"\mid", "|").replace(r"\tfrac", r"\frac")


def words(cell) -> str:
    """What a reader may read: of code its comments and strings."""
    if cell.cell_type == "markdown":
        return cell.source
    tokens = tokenize.generate_tokens(io.StringIO(cell.source).readline)
    return "\n".join(token.string for token in tokens if token.type in (tokenize.COMMENT, tokenize.STRING))


EQUATIONS = {
    number: signs(formula)
    for cells in CELLS.values()
    for cell in cells
    if cell.cell_type == "markdown"
    for formula, number in book.EQUATION.findall(cell.source)
}
PIECES = {name.lower(): signs(piece) for name, piece in NAMES.items()}


def units(text: str) -> list[str]:
    """The rows, list items and entries of a page; of other text, the sentences."""
    found = []
    for part in re.split(r"\n\s*\n|\n(?=\||- |\d+\. )", text):
        whole = "\n: " in part or part.startswith("|")
        found += [part] if whole else re.split(r"(?<=[.?]) ", part)
    return [" ".join(one.split()) for one in found]


def misplaced(unit: str) -> list[str]:
    """The numbers that a unit cites and that are not those of what it names, and the names that have no number."""
    cited = CITED.findall(unit)
    names = [name for name in PIECES if re.search(rf"(?<!\w){re.escape(name)}", unit.lower())]
    names = sorted(names, key=len)[len(names) - len(cited) :] if cited else []
    fits = {(number, name) for number in cited for name in names if PIECES[name] in EQUATIONS.get(number, "")}
    return sorted({*cited, *names} - {one for pair in fits for one in pair})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pages_cite_the_equation_that_they_name(path):
    for unit in units(path.read_text(encoding="utf-8")):
        assert misplaced(unit) == [], f"name the equation beside its number, or mend the number: {unit}"


@every_notebook
def test_notebooks_number_their_own_equations_and_cite_what_is_there(source):
    chapter = str(int(source.stem[:2]))
    text = "\n\n".join(words(cell) for cell in CELLS[source])
    assert {number.split(".")[0] for number in re.findall(r"\\tag\{(.+?)\}", text)} == {chapter}
    for unit in units(text):
        cited = CITED.findall(unit)
        assert set(cited) <= set(EQUATIONS), unit
        if any(number.split(".")[0] != chapter for number in cited):
            assert misplaced(unit) == [], unit


def test_every_name_is_that_of_an_equation():
    assert [name for name, piece in PIECES.items() if not any(piece in formula for formula in EQUATIONS.values())] == []
    assert not any("$$" in formula for formula in EQUATIONS.values())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_wrong_number_is_noticed(path):
    """Each number of a page in turn becomes every other one of its notebook."""
    for unit in units(path.read_text(encoding="utf-8")):
        for place in CITED.finditer(unit):
            for number in EQUATIONS.keys() - {place[1]}:
                if number.split(".")[0] == place[1].split(".")[0]:
                    planted = f"{unit[: place.start(1)]}{number}{unit[place.end(1) :]}"
                    assert misplaced(planted), f"({number}) in the place of ({place[1]}): {unit}"

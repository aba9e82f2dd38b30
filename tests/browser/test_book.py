"""The book and the slides as they lie on the disk: complete, within the page, and in need of no network."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
BOOK, SLIDES = ROOT / "build" / "book" / "_build" / "html", ROOT / "build" / "slides"
NOTEBOOKS = sorted(path.stem for path in ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))
PAGES = [
    f"book/{name}" for name in ("index", "cheat_sheet", "symbols", "equations", "glossary", "bibliography", "status")
]
PAGES += ["BENCH", "CONTRIBUTING", "data/results/README", "api/index", "api/flowscale_lite.problem"]
PAGES += [f"notebooks/{name}" for name in NOTEBOOKS]
FORMULAS = {"book/cheat_sheet", "book/symbols", "book/equations", "book/glossary"}

pytestmark = pytest.mark.skipif(not BOOK.exists(), reason="the book is not built: `make book`")

# Formulas not drawn, pictures not there or without a text, the name of what sticks out of the page.
LOOK = """async () => {
    if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
    const width = document.documentElement.clientWidth;
    return {
        formulas: document.querySelectorAll("mjx-container").length,
        raw: document.querySelectorAll(".math").length - document.querySelectorAll(".math mjx-container").length,
        wrong: document.querySelectorAll("mjx-merror, [data-mjx-error]").length,
        pictures: document.querySelectorAll("article img").length,
        missing: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(0, 80)),
        speechless: [...document.querySelectorAll("article img")].filter(i => !i.alt.trim()).length,
        wider: document.documentElement.scrollWidth - width,
        // what sticks out on the left cannot be scrolled to
        cut: [...document.querySelectorAll("div.math > *")].filter(e =>
            e.getBoundingClientRect().left < e.parentElement.getBoundingClientRect().left - 1).length,
    };
}"""


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_complete_and_within_the_page(page, name):
    page.goto((BOOK / f"{name}.html").as_uri())
    seen = page.evaluate(LOOK)
    assert seen["missing"] == [] and seen["speechless"] == 0 and page.faults == []
    assert seen["raw"] == 0 and seen["wrong"] == 0
    assert seen["wider"] <= 0, f"{seen['wider']} pixels stick out"
    assert seen["cut"] == 0, "formulas whose beginning cannot be reached"
    if name in FORMULAS or name.startswith("notebooks/"):
        assert seen["formulas"] > 2
    if name.startswith("notebooks/"):
        assert seen["pictures"] > 2


def test_the_search_finds_words_without_a_network(page):
    page.goto((BOOK / "search.html").as_uri() + "?q=rollover")
    page.wait_for_selector("#search-results li a", timeout=30_000)
    assert page.faults == []


def test_buttons_for_the_dark_for_colab_and_for_a_download(page):
    page.goto((BOOK / "notebooks" / "04_ode_to_sde.html").as_uri())
    themes = set()
    for _ in range(3):  # it goes round between light, dark and as the system has it
        page.locator("button.theme-switch-button:visible").first.click()
        themes.add(page.locator("html").get_attribute("data-theme"))
    assert themes == {"light", "dark"}
    assert page.locator("a[href*='colab.research.google.com'][href$='notebooks/04_ode_to_sde.ipynb']").count() > 0
    assert page.locator("a[href$='.ipynb'].btn-download-source-button").count() == 1


def test_checks_are_left_out_and_drawing_is_folded(page):
    page.goto((BOOK / "notebooks" / "00_start.html").as_uri())
    assert page.locator("details.hide summary").count() > 0
    assert "assert not counter.exact(scene, pictures).any()" not in page.content()


class Links(HTMLParser):
    """What a page links to, and the places in it that can be linked to."""

    def __init__(self):
        super().__init__()
        self.links, self.places = set(), set()

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key in ("href", "src") and value and not re.match(r"[a-z]+:|//", value):
                self.links.add(value)
            elif key in ("id", "name") and value:
                self.places.add(value)


def test_no_link_within_the_book_is_broken():
    pages = {}
    for path in BOOK.rglob("*.html"):
        if "_static" in path.parts:
            continue  # a template of the theme
        pages[path.resolve()] = links = Links()
        links.feed(re.sub(r"base64,[A-Za-z0-9+/=]+", "", path.read_text(encoding="utf-8")))
    broken = []
    for path, parsed in pages.items():
        for link in parsed.links:
            file, _, place = link.partition("#")
            target = (path.parent / unquote(file.partition("?")[0])).resolve() if file else path
            if not target.exists() or (place and target in pages and unquote(place) not in pages[target].places):
                broken.append(f"{path.relative_to(BOOK)}: {link}")
    assert len(pages) > 50 and broken == []


@pytest.mark.skipif(not SLIDES.exists(), reason="the slides are not built: `make slides`")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_slides_have_their_formulas_and_pictures(page, name):
    page.goto((SLIDES / f"{name}.html").as_uri())
    page.wait_for_function("window.Reveal && Reveal.isReady()", timeout=60_000)
    page.evaluate("MathJax.startup.promise.then(() => null)")
    assert page.evaluate("Reveal.getTotalSlides()") > 20
    assert page.locator("mjx-container").count() > 2 and page.locator("[data-mjx-error]").count() == 0
    assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0 && i.alt.trim())")
    assert page.faults == []
    wide = "[...document.querySelectorAll('section img')].filter(i => i.offsetHeight > 700).length"
    assert page.evaluate(wide) == 0

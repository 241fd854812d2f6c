"""The built pages: ``sphinx-build -n -W -b html docs docs/_build/html`` first; skipped where they were not built."""

import json
import os
import re
import shutil
import subprocess
from functools import cache
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

HTML = Path(os.environ.get("STHISTO_DOCS_HTML", Path(__file__).parents[1] / "docs" / "_build" / "html"))
PAGES = [page for page in sorted(HTML.rglob("*.html")) if "_static" not in page.parts]
NO_CONTENT = {"genindex.html", "py-modindex.html", "search.html"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
WIDTHS = (1280, 390)  # a small laptop, a telephone
pytestmark = pytest.mark.skipif(not PAGES, reason="the documentation was not built")


class Page(HTMLParser):
    """Links, resources, anchors and prose (text outside code, formulas and scripts) of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.resources, self.ids, self.prose, self.open = [], [], set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag in {"script", "link", "img", "iframe"} and attrs.get("rel") != "canonical":
            self.resources.append(attrs.get("src") or attrs.get("href") or "")
        if tag in {"pre", "code", "math", "script", "style", "dt", "title"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            self.open.remove(tag)

    def handle_data(self, data):
        if not self.open:
            self.prose.append(data)


@cache
def parse(path):
    return Page(path)


def name(page):
    return str(page.relative_to(HTML))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in parse(page).links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        assert target.exists(), link
        if parts.fragment and target.suffix == ".html":
            assert unquote(parts.fragment) in parse(target).ids, link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_need_no_network(page):
    assert not [link for link in parse(page).resources if urlsplit(link).netloc]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in NO_CONTENT], ids=name)
def test_prose_has_no_raw_markup(page):
    text = "".join(parse(page).prose)
    for kind, pattern in {
        "LaTeX": r"\\(?:frac|hat|sum|begin|mathrm|sigma|text|left|[()\[\]])|\$\$",
        "backticks": r"`",
        "roles": r":(?:func|class|meth|data|doc|cite|term):|\{(?:func|class|doc|cite)\}",
        "directives": r"^\.\. \w+::|^:::|^```",
        "parsed prose": r" -- ",  # napoleon's mark between a type and a description
    }.items():
        found = re.findall(rf".{{0,40}}(?:{pattern}).{{0,40}}", text, re.M)
        assert not found, f"{kind}: {found[:3]}"


FRAMES = """<body><script>
const results = {}; let open = PAGES.length;
for (const page of PAGES) {
  const frame = document.createElement("iframe");
  frame.style = "width: 100vw; height: 900px; border: 0"; frame.src = page;
  frame.onload = () => {
    const inside = frame.contentDocument;
    const wide = inside.documentElement.scrollWidth - frame.clientWidth;
    const broken = [...inside.querySelectorAll("article td, article th")].filter(
      cell => ["anywhere", "break-word"].includes(frame.contentWindow.getComputedStyle(cell).overflowWrap)).length;
    if (wide > 0 || broken) results[page.split("/html/")[1]] = [wide, broken];
    frame.remove();
    if (--open == 0) document.title = "CHECKED " + JSON.stringify(results);
  };
  document.body.append(frame);
}
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs a headless Chromium")
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_into_the_window_and_words_into_cells(width, tmp_path):
    """In a browser: no page scrolls sideways, and no word of a table cell is broken."""
    (tmp_path / "html").symlink_to(HTML.resolve())
    pages = [(tmp_path / "html" / page.relative_to(HTML)).as_uri() for page in PAGES]
    (tmp_path / "all.html").write_text(FRAMES.replace("PAGES", json.dumps(pages)))
    command = [
        CHROMIUM,
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        f"--window-size={width},900",
    ]
    command += ["--virtual-time-budget=60000", "--dump-dom", (tmp_path / "all.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    title = re.search(r"<title>CHECKED (.*?)</title>", dom)
    assert title, "not all pages were loaded"
    assert json.loads(unescape(title[1])) == {}

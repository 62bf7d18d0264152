"""The page in a real browser: it renders without an error, light and dark, fits a phone, answers to a pointer."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

from compress.reports.html import page
from tests.reports.test_pages import damaged

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser was found here: none of {', '.join(NAMES)}")

#: Looks at the page from inside, and leaves what it saw in the document.
PROBE = """
<script id="probe">
const mark = document.querySelector("svg .mark"), cell = document.querySelector(".map td[data-tip]");
const tip = document.getElementById("tip"), hover = (on) => on.dispatchEvent(
  new PointerEvent("pointerover", {bubbles: true}));
const seen = {width: innerWidth, needed: document.documentElement.scrollWidth};
seen.wide = [...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll, pre, svg")
  && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.tagName + "." + e.className);
seen.plots = [...document.querySelectorAll("figure svg")].map((e) => e.getBoundingClientRect().height > 80);
hover(mark); seen.point = tip.hidden ? "" : tip.textContent;
hover(cell); seen.cell = tip.hidden ? "" : tip.textContent;
const box = tip.getBoundingClientRect(); seen.inside = box.left >= 0 && box.right <= innerWidth;
hover(document.querySelector("h1")); seen.hides = tip.hidden;
seen.colours = [document.body, mark.querySelector("path") || mark].map((e) => getComputedStyle(e).backgroundColor);
seen.ink = getComputedStyle(document.body).color;
const shaded = [...document.querySelectorAll(".map td.shaded")].map((e) => getComputedStyle(e).backgroundColor);
seen.shades = new Set(shaded).size;
(parent === window ? window : parent).postMessage(JSON.stringify(seen), "*");
</script>
"""
LISTEN = "<script>onmessage = (e) => { document.documentElement.dataset.seen = e.data; };</script>"


def browse(folder, *flags, html):
    """What Chromium wrote to stdout and stderr about the page."""
    (folder / "page.html").write_text(html, encoding="utf-8")
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, f"file://{folder / 'page.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


def looked_at(folder, html, *flags, width=None):
    """What the probe saw; the page's errors and warnings fail the test. `width`: of the frame the page is in, as no
    window is as narrow as a phone."""
    html = html.replace("</body>", PROBE + "</body>")
    if width is None:
        html = html.replace("<body>", "<body>" + LISTEN)
    else:
        frame = f'<iframe style="width: {width}px; height: 800px; border: 0" srcdoc="{escape(html)}"></iframe>'
        html = f"<!doctype html><html><body>{LISTEN}{frame}</body></html>"
    dom, said = browse(folder, *flags, "--virtual-time-budget=3000", "--dump-dom", html=html)
    assert [line for line in said.splitlines() if "CONSOLE" in line] == []
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found, dom[-2000:]
    return json.loads(unescape(found[1]))


@pytest.fixture
def html(make_report):
    report = damaged(make_report())
    report.generations.append({"prompt": "x" * 300, "original": "y" * 300, "compressed": "z z " * 100})
    return page(report)


def test_it_fits_a_phone_without_scrolling_sideways_and_shows_its_plots(html, tmp_path):
    seen = looked_at(tmp_path, html, width=360)
    assert seen["width"] == 360
    assert seen["needed"] <= 360, seen["wide"]
    assert seen["wide"] == []
    assert seen["plots"] == [True, True]
    assert seen["shades"] > 3


def test_a_pointer_on_a_point_or_a_cell_shows_what_it_says_inside_the_window(html, tmp_path):
    seen = looked_at(tmp_path, html, width=360)
    assert seen["point"] == "original: perplexity 3.400, 11.53 MB"
    assert seen["cell"].startswith("model.layers.0 alone: KL 0.0010 nats a token")
    assert seen["inside"]
    assert seen["hides"]


def test_dark_and_light_are_chosen_by_what_the_reader_prefers(html, tmp_path):
    light = looked_at(tmp_path, html, "--window-size=1100,800", "--blink-settings=preferredColorScheme=1")
    dark = looked_at(tmp_path, html, "--window-size=1100,800", "--blink-settings=preferredColorScheme=0")
    assert brightness(light["colours"][0]) > 200 > 60 > brightness(light["ink"])
    assert brightness(dark["colours"][0]) < 60 < 200 < brightness(dark["ink"])
    assert light["wide"] == dark["wide"] == []


def brightness(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def test_it_prints(html, tmp_path):
    browse(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer", html=html)
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) >= 2


def test_an_error_in_the_page_would_be_seen(html, tmp_path):
    with pytest.raises(AssertionError, match="CONSOLE"):
        looked_at(tmp_path, html.replace("</main>", "<script id='bad'>nowhere();</script></main>"))

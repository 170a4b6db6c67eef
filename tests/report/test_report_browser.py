"""The report in a real browser: nothing that models wrote runs, nothing is loaded, nothing is cut,
it opens at once.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
# Asks the page itself: what sticks out to the right, which requests were made, what the sample
# browser shows after each of its filters.
PROBE = """
<script>
setTimeout(function () {
  const shown = [...document.querySelectorAll('body *')].filter((e) => e.getClientRects().length);
  const wide = shown.filter((e) => e.getBoundingClientRect().right > innerWidth + 1);
  const form = document.getElementById('filters'), place = () => document.getElementById('place').textContent, seen = {};
  if (form) {
    seen.first = place();
    form.group.value = ''; form.group.dispatchEvent(new Event('change')); seen.all = place();
    form.flip.checked = true; form.flip.dispatchEvent(new Event('change')); seen.flip = place();
    form.flip.checked = false; form.outcome.value = 'win'; form.outcome.dispatchEvent(new Event('change')); seen.win = place();
    form.outcome.value = ''; form.text.value = 'question q00007'; form.text.dispatchEvent(new Event('input')); seen.text = place();
    form.text.value = ''; form.text.dispatchEvent(new Event('input'));
    for (let n = 0; n < 40; n++) document.getElementById('next').click();
    seen.last = place();
    seen.children = [...document.querySelectorAll('#sample *')].map((e) => e.tagName).filter((v, i, a) => a.indexOf(v) === i).sort();
  }
  const tall = document.documentElement.scrollHeight;
  document.querySelector('nav a[href="#scores"]').click();
  const copied = {};
  navigator.clipboard.writeText = (text) => { copied.last = text; return Promise.resolve(); };
  for (const button of document.querySelectorAll('.copy button')) {
    button.click();
    copied[button.textContent.trim()] = copied[button.textContent.trim()] || copied.last;
  }
  document.body.setAttribute('data-probe', JSON.stringify({
    title: document.title, wide: wide.map((e) => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 40)).slice(0, 5),
    width: innerWidth, tall: tall, folded: document.querySelectorAll('.part:not([open])').length,
    requests: performance.getEntriesByType('resource').map((e) => e.name.slice(0, 60)).filter((name) => !name.startsWith('data:')),
    answer: document.getElementById('answer').getBoundingClientRect().bottom, height: innerHeight, seen: seen, copied: copied }));
}, 900);
</script>
"""  # noqa: E501


def ask(page: Path, width: int = 1300, height: int = 900) -> dict:
    """Open a page and return what it says about itself."""
    probed = page.with_name("probed.html")
    probed.write_text(
        page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8"
    )
    words = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        f"--window-size={width},{height}",
        "--dump-dom",
        f"file://{probed}",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stderr[-500:]
    return json.loads(
        found[1]
        .replace("&quot;", '"')
        .replace("&amp;", "&")
        .replace("&lt;", "<")
        .replace("&gt;", ">")
    )


def html_of(written, **options) -> Path:
    """Write a report's page alone: figures are drawn, TeX is not asked."""
    return written(**options) / "report.html"


@pytest.fixture(autouse=True)
def needs_a_browser_alone(monkeypatch):
    if CHROMIUM is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "no Chromium: apt-get install chromium"
        )
    monkeypatch.setattr("recipes_lib.report.documents.compile_pdf", lambda folder: None)


def test_nothing_that_a_model_wrote_runs(written):
    seen = ask(html_of(written, hostile=True, n=62))
    assert "owned" not in seen["title"]
    assert seen["requests"] == []
    assert seen["seen"]["all"].endswith("of 506") and seen["seen"]["last"].startswith("41 of")
    assert set(seen["seen"]["children"]) <= {"P", "B", "SPAN", "DIV", "H4"}
    assert seen["wide"] == []
    for line in csv.reader(seen["copied"]["CSV"].splitlines()):
        assert not any(cell[:1] in ("=", "+", "-", "@") and cell for cell in line), line


def test_a_table_is_copied_as_markdown_csv_and_latex(written):
    page = html_of(written, names=("a_b", "r8"), n=60)
    copied = ask(page)["copied"]
    assert copied["Markdown"].startswith("| metric | r8 | a\\_b | effect \\[95% interval\\] |")
    assert next(csv.reader(copied["CSV"].splitlines()))[:3] == ["metric", "r8", "a_b"]
    rows = copied["LaTeX"].splitlines()
    assert (
        rows[0].startswith("\\begin{tabular}{l")
        and rows[1] == "\\toprule"
        and rows[-1] == "\\end{tabular}"
    )
    assert rows[2].startswith("metric & r8 & a\\_b & effect [95\\% interval]")
    assert "recipes compare" in copied["commands"]


def test_printed_it_is_tables_on_a_few_pages(written):
    page = html_of(written, names=("base", "r8", "r32"), n=60)
    target = page.with_name("printed.pdf")
    words = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=3000",
        f"--print-to-pdf={target}",
    ]
    subprocess.run([*words, f"file://{page}"], capture_output=True, timeout=240, check=True)
    assert (
        4 <= len(re.findall(rb"/Type /Page\b", target.read_bytes())) <= 14
    )  # as the cards of a phone it was 33


def test_nothing_is_cut_on_a_desktop_and_the_first_screen_answers(written):
    page = html_of(written, names=("base", "r8", "r32"), n=60)
    seen = ask(page)
    assert seen["wide"] == [] and seen["requests"] == []
    assert seen["answer"] < seen["height"]
    counts = seen["seen"]
    total = int(counts["all"].split(" of ")[1])
    assert 0 < int(counts["flip"].split(" of ")[1]) < total
    assert 0 < int(counts["win"].split(" of ")[1]) < total
    assert 0 < int(counts["text"].split(" of ")[1]) < int(counts["all"].split(" of ")[1])
    narrow = ask(page, width=500, height=950)
    assert narrow["width"] <= 500 and narrow["wide"] == []


def test_on_a_phone_the_long_parts_are_folded_and_a_link_opens_them(written):
    page = html_of(written, names=("base", "r8", "r32"), n=60)
    narrow, wide = ask(page, width=500, height=950), ask(page)
    assert narrow["tall"] < 8 * 950
    assert narrow["folded"] >= 6 and wide["folded"] == 0
    page.write_text(
        page.read_text(encoding="utf-8").replace('class="part"', 'class="unfolded"'),
        encoding="utf-8",
    )
    assert ask(page, width=500, height=950)["tall"] > 2 * narrow["tall"]


def test_three_arms_with_805_questions_open_in_two_seconds(written):
    page = html_of(written, names=("base", "r8", "r32"), n=805)
    # CPU seconds of the browser with the report, less those with an empty page: the machine may be
    # busy.
    spent = []
    empty = page.with_name("empty.html")
    empty.write_text("<!doctype html><title>empty</title>")
    for file in (empty, page):
        before = _children_seconds()
        words = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--dump-dom",
            f"file://{file}",
        ]
        subprocess.run(words, capture_output=True, timeout=240, check=True)
        spent.append(_children_seconds() - before)
    assert spent[1] - spent[0] < 2.0, spent


def _children_seconds() -> float:
    import resource

    time.sleep(0.2)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

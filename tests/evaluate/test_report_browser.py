"""The report in a real browser: on a screen, on a phone, in the dark, on paper."""

import html
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from example_runs import write_run, write_runs

from megatron_infoentropy.evaluate.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: chromium is not on PATH")

FIGURES = 9
FRAME = """<!doctype html><iframe width={width} height=900 src="{page}"></iframe>
<script>onload = () => {{
  const page = document.querySelector("iframe").contentWindow;
  document.body.textContent = JSON.stringify({scripts}.map(script => page.eval(script)));
}}</script>"""


def browse(folder: Path, *words: str, scheme: str = "light") -> str:
    """Start Chromium without a network; return what it prints, if the page makes no complaint."""
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-background-networking", "--proxy-server=127.0.0.1:9",
               "--allow-file-access-from-files", "--enable-logging=stderr",
               f"--user-data-dir={folder / 'profile'}",
               f"--blink-settings=preferredColorScheme={int(scheme == 'light')}")  # fmt: skip
    done = subprocess.run(
        [str(CHROMIUM), *options, *words], capture_output=True, text=True, check=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr
    return done.stdout


def look(page: Path, width: int, *scripts: str, scheme: str = "light") -> list[Any]:
    """Show the page in a frame of that width; return what JavaScript expressions give in it."""
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(width=width, page=page.name, scripts=json.dumps(scripts)))
    text = browse(page.parent, "--dump-dom", frame.as_uri(), scheme=scheme)
    return json.loads(html.unescape(text.partition("<body>")[2].partition("</body>")[0]))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of six runs."""
    folder = tmp_path_factory.mktemp("browser")
    shifts = {"cross_entropy": 0.0, "focal": 0.02, "infoentropy": -0.1}
    return write_report(write_runs(folder, shifts, (1, 2)), folder)


@pytest.fixture(scope="module")
def unlike(tmp_path_factory):
    """The report of settings that differ in length too and in how they were trained."""
    folder = tmp_path_factory.mktemp("unlike")
    size = {"parameters": 205_120, "global_batch_size": 8, "seq_length": 64}
    facts = {"gamma": 1.0, "sigma": 1.0, "normalization": "global"}
    stages = [{"from_step": n, "objective": o, "seed": 1} | facts
              for n, o in ((0, "cross_entropy"), (16, "infoentropy"))]  # fmt: skip
    runs = [write_run(folder / f"ce-{seed}", seed=seed, **size) for seed in (1, 2)]
    for steps in (400, 320):
        loss = {"objective": "infoentropy", "normalization": "global", "train_iters": steps}
        runs.append(write_run(folder / f"ie-{steps}", **loss, **size))
    staged = {"objective": "infoentropy", "lineage": stages}
    runs.append(write_run(folder / "staged", **staged, **size))
    return write_report(runs, folder)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_figures_fit_answers_come_first_and_colours_follow_the_scheme(page, width, scheme):
    boxes, whole, paper, text, ends = look(
        page,
        width,
        "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width)",
        "document.scrollingElement.scrollWidth",
        "getComputedStyle(document.body).backgroundColor",
        "getComputedStyle(document.querySelector('figure svg text')).fill",
        """['.answers', '.first-screen figure'].map(
            part => document.querySelector(part).getBoundingClientRect().bottom)""",
        scheme=scheme,
    )
    assert len(boxes) == FIGURES
    assert all(0.35 * width < box <= width for box in boxes)
    assert whole <= width
    assert (is_dark(paper), is_dark(text)) == (scheme == "dark", scheme != "dark")
    if width == 1280:
        assert 300 < min(ends) < max(ends) < 800, "all on the first screen"


@pytest.mark.parametrize("width", [1200, 800])
def test_no_table_and_no_legend_is_cut(unlike, width):
    ends, legends = look(
        unlike,
        width,
        """[...document.querySelectorAll('th')].filter(t => t.textContent == 'p (Holm)').map(
            t => t.getBoundingClientRect().right)""",
        """[...document.querySelectorAll('figure svg')].flatMap(svg => {
          const box = svg.getBoundingClientRect();
          return [...svg.querySelectorAll('[id*=legend] text')]
            .filter(t => t.getBoundingClientRect().right > box.right
                      || t.getBoundingClientRect().top < box.top - 1)
            .map(t => t.textContent);
        })""",
    )
    assert 0 < max(ends) < width
    assert legends == []


def test_it_prints_and_never_on_dark_paper(page):
    printed = page.with_suffix(".pdf")
    browse(page.parent, f"--print-to-pdf={printed}", page.as_uri(), scheme="dark")
    assert printed.read_bytes().startswith(b"%PDF")
    assert printed.stat().st_size > 50_000
    (dark,) = look(page, 800, """[...document.styleSheets[0].cssRules].map(
        rule => rule.conditionText || "").filter(text => text.includes("dark"))""")  # fmt: skip
    assert dark
    assert all(text.startswith("screen") for text in dark)


def is_dark(color: str) -> bool:
    """Of rgb(r, g, b)."""
    return sum(int(part) for part in color.strip("rgb()").split(",")) < 3 * 128

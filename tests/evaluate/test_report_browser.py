"""The report in a real browser: on a screen, on a phone, in the dark, on paper."""

import os
from pathlib import Path

import pytest
from browser import CHROMIUM, open_browser
from example_runs import write_run, write_runs

from megatron_infoentropy.evaluate.report import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: chromium is not on PATH")

FIGURES = 8
BOXES = "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width)"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
TEXT = "getComputedStyle(document.querySelector('figure svg text')).fill"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of six runs; REPORT_PICTURES names a folder to keep pictures in, to look at."""
    folder = tmp_path_factory.mktemp("browser")
    shifts = {"cross_entropy": 0.0, "focal": 0.02, "infoentropy": -0.1}
    file = write_report(write_runs(folder, shifts, (1, 2)), folder)
    with open_browser(folder / "profile") as page:
        page.open(file)
        yield page


@pytest.mark.parametrize(
    ("width", "scheme", "media"),
    [(1280, "light", "screen"), (1280, "dark", "screen"), (390, "light", "screen"),
     (800, "dark", "print")],
)  # fmt: skip
def test_every_figure_is_there_and_nothing_sticks_out(page, width, scheme, media):
    page.look(width=width, scheme=scheme, media=media)
    boxes = page.run(BOXES)
    assert len(boxes) == FIGURES
    assert all(0.35 * width < box <= width for box in boxes)
    if media == "screen":
        assert page.run("document.scrollingElement.scrollWidth") <= width
    is_dark = scheme == "dark" and media == "screen"
    assert _is_dark(page.run(BACKGROUND)) == is_dark
    assert _is_dark(page.run(TEXT)) != is_dark
    if folder := os.environ.get("REPORT_PICTURES"):
        page.screenshot(Path(folder) / f"report-{media}-{scheme}-{width}.png")


@pytest.fixture(scope="module")
def unlike(page, tmp_path_factory):
    """The tab, on the report of settings that differ in length too and in how they were trained."""
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
    page.open(write_report(runs, folder))
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_three_answers_and_the_picture_are_on_the_first_screen(page, scheme):
    page.look(width=1280, scheme=scheme)
    ends = page.run("""['.answers', '.first-screen figure'].map(
        part => document.querySelector(part).getBoundingClientRect().bottom)""")
    assert min(ends) > 300
    assert max(ends) < 800


@pytest.mark.parametrize("width", [1200, 800])
def test_no_table_is_cut(unlike, width):
    unlike.look(width=width)
    last = "[...document.querySelectorAll('th')].filter(t => t.textContent == 'p (Holm)')"
    ends = unlike.run(f"{last}.map(t => t.getBoundingClientRect().right)")
    assert ends
    assert max(ends) < width


def test_no_legend_is_cut(unlike):
    unlike.look(width=1200)
    sticking_out = """
        [...document.querySelectorAll('figure svg')].flatMap(svg => {
          const box = svg.getBoundingClientRect();
          return [...svg.querySelectorAll('[id*=legend] text')]
            .filter(t => t.getBoundingClientRect().right > box.right
                      || t.getBoundingClientRect().top < box.top - 1)
            .map(t => t.textContent);
        })"""
    assert unlike.run(sticking_out) == []


def test_it_prints(page, tmp_path):
    page.look(width=1280, media="")  # its own: print, while it prints
    printed = Path(os.environ.get("REPORT_PICTURES", tmp_path)) / "report.pdf"
    page.pdf(printed)
    assert printed.read_bytes().startswith(b"%PDF")
    assert printed.stat().st_size > 50_000


def test_the_browser_has_no_complaint(page):
    assert page.complaints == []


def _is_dark(color: str) -> bool:
    """Of rgb(r, g, b)."""
    return sum(int(part) for part in color.strip("rgb()").split(",")) < 3 * 128

"""The report in a browser: standards, accessibility, small screens, and no request to a network."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import accessibility, chromium, html_errors
from tests.helpers.run_folders import BACK, SPIKE, START, write_error_rates, write_run, write_samples, write_utterance
from w2vscale.analysis.report.page import FOLDER, write_report

pytestmark = pytest.mark.long
SENTENCE = (
    "it was a very long sentence which does not fit into one line of the screen of any telephone that is sold today"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of runs of three objectives that has every section."""
    folder = tmp_path_factory.mktemp("browser")
    first = write_run(folder / "pretrained", "base", events=(START, SPIKE, BACK), roll_backs=(30,))
    sets = "data={validation: v.jsonl, validation_sets: {dev-a: a.jsonl, dev-b: b.jsonl}}"
    second = write_run(folder / ("another_run_with_a_very_long_name_" * 4), "best_rq_tiny", sets)
    third = write_run(folder / "tuned", "ctc_1h", "trainer.updates=100")
    for update in (50, 100):
        write_samples(first, update)
    write_utterance(third, 100, 1, f"reference:  {SENTENCE}\nhypothesis: {'x' * 200}")
    texts = [(SENTENCE, SENTENCE.replace("very", "").replace("line", "lime and line")), ("x" * 90, "y" * 120)]
    write_error_rates(third / "wer_test.json", texts)
    (third / "evaluation.json").write_text('{"update": 100, "utterances": 3.0, "table": {"loss": "1.5 nats"}}')
    output = folder / "report.html"
    write_report([first, second, third], output, published=True)
    return output


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for all tests."""
    with chromium() as found:
        yield found


@pytest.fixture
def opened(browser: Any, report: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The report, open at the width and in the colours that the test has as its parameters."""
    width, colours = getattr(request, "param", (1280, "light"))
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=colours)
    page = context.new_page()
    page.problems, page.requests = [], []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda asked: page.requests.append(asked.url))
    page.goto(report.as_uri())
    yield page
    context.close()


everywhere = pytest.mark.parametrize(
    "opened", [(width, colours) for width in (360, 1280) for colours in ("light", "dark")], indirect=True
)


def test_it_is_valid_html(report: Path) -> None:
    assert html_errors(report) == []


def test_its_style_is_valid(opened: Any) -> None:
    styles = re.sub(r"/\*.*?\*/", "", (FOLDER / "style.css").read_text(), flags=re.DOTALL)
    found = re.findall(r"(?<=[{;\s])(?!-)([a-z-]+):\s*([^;{}]+)(?=[;}])", styles)
    assert len(found) > 200
    unknown = [
        f"{name}: {value}"
        for name, value in found
        if not opened.evaluate("(one) => CSS.supports(...one)", [name, value])
    ]
    assert unknown == []
    written = opened.evaluate("document.querySelector('style').textContent")
    kept = opened.evaluate("[...document.styleSheets[0].cssRules].map((one) => one.cssText).join()")
    assert kept.count("{") == written.count("{") - written.count("::-moz-"), "Chromium knows all rules but Firefox's"


def test_the_checker_finds_errors(report: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.html"
    damaged.write_text(report.read_text().replace("<th ", "<blink ", 1))
    assert "error" in {one["type"] for one in html_errors(damaged)}


@everywhere
def test_it_is_accessible(opened: Any) -> None:
    assert accessibility(opened) == []
    opened.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert accessibility(opened) == []


def test_the_rules_find_what_is_wrong(opened: Any) -> None:
    opened.evaluate("document.querySelector('h1').style.color = '#eee'; document.querySelector('img').alt = ''")
    opened.evaluate("document.querySelector('img').removeAttribute('alt')")
    assert {line.partition(":")[0] for line in accessibility(opened)} == {"color-contrast", "image-alt"}


@everywhere
def test_only_tables_scroll_to_the_side(opened: Any) -> None:
    opened.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    width = opened.viewport_size["width"]
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    assert opened.evaluate(
        "document.querySelector('.alignment').scrollWidth <= document.querySelector('.alignment').clientWidth"
    )
    if width == 360:
        wide = "[...document.querySelectorAll('.scroll')].some((one) => one.scrollWidth > one.clientWidth)"
        assert opened.evaluate(wide), "nothing was too wide, so this test shows nothing"


@pytest.mark.parametrize("opened", [(360, "light"), (360, "dark")], indirect=True)
def test_an_edge_beyond_which_there_is_more_has_a_shadow(opened: Any) -> None:
    """The columns of pixels at the right edge of a table that scrolls, before and after it is scrolled to its end."""
    from PIL import Image

    opened.evaluate("document.querySelector('nav').remove()")  # it covers what is below it
    box = opened.locator(".scroll[aria-label='settings']")

    def shades() -> int:
        with Image.open(BytesIO(box.screenshot())) as image:
            low, high = image.convert("L").crop((image.width - 20, 6, image.width - 4, 7)).getextrema()
            return int(high - low)

    assert shades() > 20
    box.evaluate("(one) => one.scrollTo({left: 10000, behavior: 'instant'})")
    assert shades() < 5


@everywhere
def test_no_text_of_a_plot_covers_another(opened: Any) -> None:
    overlaps, texts = opened.evaluate("""() => {
        const found = [];
        let count = 0;
        for (const chart of document.querySelectorAll(".by-updates")) {
            const texts = [...chart.querySelectorAll("text")];
            count += texts.length;
            texts.forEach((one, place) => {
                const a = one.getBoundingClientRect(), outer = chart.closest("figure").getBoundingClientRect();
                if (a.right > outer.right || a.left < outer.left) found.push(`${one.textContent} is cut`);
                for (const other of texts.slice(place + 1)) {
                    const b = other.getBoundingClientRect();
                    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
                    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
                    if (x > 0.5 && y > 0.25 * a.height) found.push(`${one.textContent} and ${other.textContent}`);
                }
            });
        }
        return [found, count];
    }""")
    assert overlaps == [] and texts > 50


@everywhere
def test_the_parts_of_an_utterance_are_below_each_other(opened: Any) -> None:
    opened.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    figure = opened.locator("figure", has_text="utterance 1").first
    outer = figure.bounding_box()
    boxes = [figure.locator(one).first.bounding_box() for one in ("figcaption", ".scroll", "audio", ".text")]
    assert all(outer["x"] <= one["x"] and one["x"] + one["width"] <= outer["x"] + outer["width"] for one in boxes)
    assert all(one["y"] + one["height"] <= other["y"] + 1 for one, other in itertools.pairwise(boxes))


@everywhere
def test_nothing_is_requested_and_nothing_fails(opened: Any, report: Path) -> None:
    opened.mouse.move(300, 300)
    opened.wait_for_timeout(200)
    assert opened.problems == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [report.as_uri()]
    assert opened.evaluate("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")


def test_an_injected_script_does_not_run(opened: Any) -> None:
    opened.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.injected = true";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", "<img src='data:,' onerror='window.injected = true'>");
        document.body.insertAdjacentHTML("beforeend", "<img src='https://example.org/x.png'>");
    }""")
    opened.wait_for_timeout(300)
    assert opened.evaluate("window.injected") is None
    assert len(opened.problems) >= 3, "the policy reports what it has refused"


def test_a_run_can_be_hidden_and_the_axis_changed(opened: Any) -> None:
    assert opened.locator(".by-updates .run-1 .training").first.is_visible()
    opened.locator("#show-1").uncheck()
    assert not opened.locator(".by-updates .run-1 .training").first.is_visible()
    assert opened.locator(".by-updates .run-0 .training").first.is_visible()
    assert not opened.locator(".by-hours").first.is_visible()
    opened.locator("#by-hours").check()
    assert opened.locator(".by-hours").first.is_visible() and not opened.locator(".by-updates").first.is_visible()


def test_values_are_shown_where_the_pointer_is(opened: Any) -> None:
    chart = opened.locator(".by-updates").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    opened.mouse.move(box["x"] + box["width"] * 0.95, box["y"] + box["height"] / 2)
    shown = opened.locator(".values")
    assert "near update 100" in shown.inner_text() and "pretrained, training" in shown.inner_text()
    opened.mouse.move(0, 0)
    assert shown.count() == 0


def test_it_is_complete_without_scripts(browser: Any, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator(".by-updates").count() == page.locator("figure .chart").count() // 2 > 6
    page.locator("#by-hours").check()
    page.locator("#show-0").uncheck()
    assert page.locator(".by-hours").first.is_visible()
    assert not page.locator(".by-hours .run-0 .training").first.is_visible()
    context.close()

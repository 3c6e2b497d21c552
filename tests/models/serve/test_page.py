"""The page in a real browser: playwright drives the system's chromium. About 40 s on two cores."""

import shutil

import pytest

from .process import served
from .test_openai import SIZES

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("uvicorn")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]
TEXT = "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG. <B>AND</B> RUNS AWAY"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    from .. import golden

    with served("--checkpoint", golden.FOLDER / "glm5", "--model-name", "tiny", *SIZES) as server:
        yield server.url
        assert server.stop() == (0, True), server.lines


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(url)
    page.set_default_timeout(120_000)
    yield page
    assert errors == []
    page.close()


def marked(page, method):
    return page.eval_on_selector_all(f'section[data-method="{method}"] mark', "nodes => nodes.map(n => n.textContent)")


def test_a_text_is_continued_and_what_each_method_selects_is_lit_up(page, url):
    page.wait_for_function("() => document.querySelector('#model').textContent === 'tiny'")
    page.fill("#prompt", TEXT)
    page.fill("#max_tokens", "12")
    page.fill("#topk", "8")
    page.click("#continue")
    page.wait_for_selector('section[data-method="flat"]')
    whole = page.text_content("#text")
    assert whole.startswith(TEXT) and len(whole) == len(TEXT) + 12
    names = page.eval_on_selector_all("section", "nodes => nodes.map(n => n.dataset.method)")
    assert names == ["flat", "HISA", "scan", "block-sparse"]
    assert page.eval_on_selector_all("#text .query", "nodes => nodes.map(n => +n.dataset.i)") == [len(whole) - 1]
    numbers = page.eval_on_selector_all(".numbers", "nodes => nodes.map(n => n.textContent)")
    assert numbers[0].startswith("recall 100.0 %, kept mass ") and numbers[0].endswith(f"8 of {len(whole)} tokens")
    before = marked(page, "flat")
    assert 6 < len("".join(before)) < 9  # the query may be among the 8, and has a colour of its own

    page.click('#text span[data-i="40"]')  # another query
    page.wait_for_selector('#text span.query[data-i="40"]')
    panel = page.text_content('section[data-method="HISA"] pre')
    assert panel == whole[:41] and page.text_content(".query") == whole[40]
    answer = page.request.post(f"{url}/look", data={"text": whole, "layer": 2, "query": 40, "topk": 8}).json()
    with page.expect_response("**/look"):
        page.select_option("#layer", "2")  # another layer
    page.wait_for_function("() => document.querySelector('#status').textContent === ''")
    for method in answer["methods"]:
        lit = [position for position in method["positions"] if position != 40]
        assert "".join(marked(page, method["name"])) == "".join(whole[position] for position in lit)


def test_what_is_wrong_is_said_and_text_is_no_markup(page):
    page.fill("#prompt", "lower case")
    page.click("#continue")
    page.wait_for_function("() => document.querySelector('#error').textContent.includes('holds byte 108')")
    page.fill("#prompt", TEXT)
    page.fill("#topk", "900")
    page.click("#continue")
    page.wait_for_function("() => document.querySelector('#error').textContent.includes('topk is 900')")
    assert TEXT in page.text_content("#text") and page.query_selector("#text b") is None


def test_a_stream_is_stopped(page):
    """By a click at its first text, within the page: the tiny model would be done before one from outside."""
    page.fill("#prompt", TEXT[:20])
    page.fill("#max_tokens", "100")
    page.evaluate(
        """() => new MutationObserver(() => {
          if (document.querySelector("#text").textContent.length > 22) document.querySelector("#stop").click();
        }).observe(document.querySelector("#text"), { childList: true })"""
    )
    page.click("#continue")
    page.wait_for_selector("section")
    assert 22 < len(page.text_content("#text")) < 120
    assert ", 2 of 2" in page.text_content('section[data-method="flat"] .numbers')  # an eighth, as it was not told

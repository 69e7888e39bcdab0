"""The page at `/`: what its files may do, and what people do with it in a browser, against a true server."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from pacers import make_estimator, make_pacer
from serving import client_of, serving
from stand_in_engine import StandInEngine

from pacevlm.errors import OverloadError
from pacevlm.server import samples
from pacevlm.server.app import PAGE_FOLDER
from pacevlm.server.config import ServeConfig
from pacevlm.server.engine import Engine

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request

    from pacevlm.models.elastic import ElasticModel

OWN = [path for path in PAGE_FOLDER.iterdir() if path.is_file()]
LIBRARY = PAGE_FOLDER / "lit-html"
FULL_P50_MS = 2000.0


# Files ---------------------------------------------------------------------------------------------------------------


def test_every_file_comes_with_a_policy_that_allows_nothing_from_elsewhere() -> None:
    with serving(StandInEngine()) as address, client_of(address) as client:
        for path in ["", *(str(path.relative_to(PAGE_FOLDER)) for path in PAGE_FOLDER.rglob("*") if path.is_file())]:
            response = client.get(f"/{path}")
            assert response.status_code == 200
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "require-trusted-types-for 'script'" in policy
            assert "unsafe" not in policy
            assert not re.search(r"https?:|\*", policy)
            assert response.headers["x-content-type-options"] == "nosniff"


def test_no_file_names_another_server() -> None:
    for path in OWN:
        addresses = set(re.findall(r"(?:[a-z]+:)?//[\w.-]+\.\w+[^\s\"'`]*", path.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path


def test_every_file_that_is_named_is_there() -> None:
    named = {name for path in OWN for name in re.findall(r'(?:(?:href|src)=|from )"([\w./-]+\.\w+)"', path.read_text())}
    missing = {name for name in named if not (PAGE_FOLDER / name).is_file()}
    assert missing == {"openapi.json"}  # which the application answers
    assert len(named) > len(OWN)


def test_text_cannot_become_markup() -> None:
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|unsafe|\beval\b|Function\("
    inline = r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)"
    for path in OWN:
        assert not re.search(sinks, path.read_text()), path
        assert path.suffix != ".html" or not re.search(inline, path.read_text()), path


def test_the_library_is_the_published_one_with_its_licence() -> None:
    published = "b878e7f95dec8a9b6e9b217faca6b6a11bad82ebc44c0caa77419ed83edd81f2"  # lit-html 3.3.3
    assert hashlib.sha256((LIBRARY / "lit-html.js").read_bytes()).hexdigest() == published
    assert (LIBRARY / "LICENSE").read_text().startswith("BSD 3-Clause License")


def test_the_page_is_told_what_it_chooses_from() -> None:
    engine = StandInEngine()
    with serving(engine) as address, client_of(address) as client:
        told = client.get("/v1/models").json()["data"][0]["pacevlm"]
    space = engine.outlook.knob_space
    assert (told["tiers"], told["top_ks"], told["num_blocks"]) == tuple(
        list(values) for values in (space.tiers, space.top_ks, space.num_blocks)
    )
    assert (told["full_p50_ms"], told["default_budget_ms"], told["default_price"]) == (20.0, 80.0, 0.0)


def no_digits(*_: Any) -> None:
    raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")


@pytest.fixture
def without_digits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    samples.samples.cache_clear()
    monkeypatch.setattr(samples, "load_digits", no_digits)
    yield
    samples.samples.cache_clear()


@pytest.mark.usefixtures("without_digits")
def test_samples_that_cannot_be_made_say_what_to_install() -> None:
    with serving(StandInEngine()) as address, client_of(address) as client:
        response = client.get("/samples")
    assert response.status_code == 404
    assert "pacevlm[digits]" in response.json()["error"]["message"]


# In a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright, extra `browser`, is not installed")
    with sync_api.sync_playwright() as playwright:
        found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
        path = next((path for path in found if path), playwright.chromium.executable_path)
        if not Path(path).exists():
            pytest.skip("there is no Chromium; `playwright install chromium` brings one")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--no-proxy-server"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(
    tiny_elastic: ElasticModel, tiny_elastic_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A server whose worker runs the tiny model; so slow a profile that a busy machine keeps every bound."""
    estimator = make_estimator(tiny_elastic, 0.01)
    pictures = {**estimator.pictures, "png": estimator.pictures["jpeg"]}
    estimator = dataclasses.replace(estimator, pictures=pictures)
    folder = tmp_path_factory.mktemp("page")
    make_pacer(tiny_elastic, tiny_elastic_dir, estimator=estimator, full_p50_ms=FULL_P50_MS).save_pretrained(folder)
    with serving(Engine(ServeConfig(run_dir=folder))) as address:
        yield address


class Visit:
    """A page that was opened, what it asked the server, and what the browser complained of."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        self.urls: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        page.on("request", self._note)
        page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(address)
        page.locator(".sample img, .wide, #key:visible").first.wait_for()

    def _note(self, request: Request) -> None:
        self.urls.append(request.url)
        if request.post_data:
            self.asked.append(json.loads(request.post_data))

    def ask(self) -> None:
        self.page.get_by_role("button", name="Ask", exact=True).click()
        self.page.locator(".outcome, .refusal").wait_for()
        assert self.page.locator(".refusal").count() == 0, self.text(".refusal")
        self.page.get_by_text("Full knobs answered").wait_for()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()


@contextmanager
def visiting(browser: Browser, address: str, width: int = 1280, height: int = 800, **settings: Any) -> Iterator[Visit]:
    """Visit; at the end nothing was asked of another server, and nobody complained but of refusals."""
    context = browser.new_context(viewport={"width": width, "height": height}, **settings)
    context.set_default_timeout(8_000)
    visit = Visit(context.new_page(), address)
    try:
        yield visit
        assert [url for url in visit.urls if not url.startswith((f"{address}/", "data:"))] == []
        assert [text for text in visit.complaints if "Failed to load resource" not in text] == []
    finally:
        context.close()


def test_a_sample_is_answered(browser: Browser, address: str, tiny_elastic: ElasticModel) -> None:
    with visiting(browser, address) as visit:
        assert "ready" in visit.text("#status")
        assert "not made for" in visit.text("#kinds-note")  # it is the tiny model that is served
        sample = visit.page.locator(".sample").nth(7)
        question = sample.get_attribute("title")
        sample.click()
        assert visit.page.locator("#question").input_value() == question
        visit.ask()

        first, full = visit.asked
        assert first["messages"][0]["content"][0] == {"type": "text", "text": question}
        assert first["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
        assert (first["latency_budget_ms"], first["stream"]) == (FULL_P50_MS, True)
        assert full["messages"] == first["messages"]
        assert full["knobs"] == str(tiny_elastic.knob_space.full)
        assert visit.text(".asked") == question
        assert visit.text(".said").strip()
        assert "In time" in visit.text(".verdict")
        assert visit.page.locator(".timeline .bar").count() == 18  # of the answer, and of full knobs
        assert f"budget {FULL_P50_MS:.0f} ms" in (visit.page.locator(".timeline").text_content() or "")
        visit.page.locator("#spoken", has_text="In time").wait_for(state="attached")
        assert visit.complaints == []


def test_sliders_ask_again_with_what_they_say(browser: Browser, address: str) -> None:
    with visiting(browser, address) as visit:
        visit.ask()
        budget = visit.page.locator("#budget")
        budget.focus()
        with visit.page.expect_response("**/v1/chat/completions"):
            visit.page.keyboard.press("End")
        budget_ms = visit.asked[-1]["latency_budget_ms"]
        assert 4 * FULL_P50_MS < budget_ms < 5 * FULL_P50_MS
        assert f"{budget_ms:.0f} ms" in visit.text("#budget-shown")
        assert budget.get_attribute("aria-valuetext").startswith(f"{budget_ms:.0f} ms")
        visit.page.locator("#price").focus()
        with visit.page.expect_response("**/v1/chat/completions"):
            visit.page.keyboard.press("End")
        assert visit.asked[-1]["price"] == 100
        assert len([asked for asked in visit.asked if "knobs" in asked]) == 1  # full knobs are asked once per question


def test_ones_own_picture_is_asked_about(browser: Browser, address: str, picture: bytes) -> None:
    with visiting(browser, address) as visit:
        visit.page.locator("#file").set_input_files({"name": "mine.jpg", "mimeType": "image/jpeg", "buffer": picture})
        visit.page.get_by_alt_text("mine.jpg").wait_for()
        visit.page.locator("summary").click()
        visit.page.get_by_role("button", name=re.compile("^What colour is the ")).click()
        visit.ask()
        content = visit.asked[0]["messages"][0]["content"]
        assert content[0]["text"].startswith("What colour is the ")
        assert content[1]["image_url"]["url"].startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(
    "event",
    [
        "new DragEvent('drop', { dataTransfer: data, bubbles: true })",
        "new ClipboardEvent('paste', { clipboardData: data, bubbles: true })",
    ],
)
def test_a_picture_is_dropped_or_pasted(browser: Browser, address: str, event: str) -> None:
    with visiting(browser, address) as visit:
        put = f"""const data = new DataTransfer();
            data.items.add(new File(["a picture"], "put.png", {{ type: "image/png" }}));
            document.getElementById("question").dispatchEvent({event});"""
        visit.page.evaluate(f"() => {{ {put} }}")
        visit.page.get_by_alt_text("put.png").wait_for()


def test_a_refusal_is_said_in_the_servers_words(browser: Browser, address: str) -> None:
    with visiting(browser, address) as visit:
        visit.page.locator("#budget").focus()
        visit.page.keyboard.press("Home")
        with visit.page.expect_response("**/v1/chat/completions") as found:
            visit.page.get_by_role("button", name="Ask", exact=True).click()
        response = found.value
        assert response.status == 400
        visit.page.get_by_role("alert").wait_for()
        assert visit.page.locator(".why").text_content() == response.json()["error"]["message"]
        assert "Refused (400)" in visit.text(".refusal")


def test_what_is_not_a_picture_is_refused_and_markup_stays_text(browser: Browser, address: str) -> None:
    with visiting(browser, address) as visit:
        broken = {"name": "<img src=x onerror=alert(1)>", "mimeType": "image/png", "buffer": b"no picture"}
        visit.page.locator("#file").set_input_files(broken)
        visit.page.get_by_role("button", name="Ask", exact=True).click()
        visit.page.get_by_role("alert").wait_for()
        assert "Refused (400)" in visit.text(".refusal")
        visit.page.locator(".sample").first.click()
        visit.page.locator("#question").fill("<b>How many</b> digits?")
        visit.page.keyboard.press("Enter")
        visit.page.get_by_text("<b>How many</b> digits?").wait_for()
        assert visit.page.locator(".asked b").count() == 0


def test_a_full_queue_offers_a_budget_that_fits(browser: Browser) -> None:
    engine = StandInEngine()
    with serving(engine) as address, visiting(browser, address) as visit:
        engine.error = OverloadError("the queue is full; try again in 1.20 s", 1.2, 50.0)
        visit.page.get_by_role("button", name="Ask", exact=True).click()
        visit.page.get_by_role("alert").wait_for()
        assert "Refused (429)" in visit.text(".refusal")
        assert "Retry-After: 2 s" in visit.text(".refusal")
        engine.error = None
        visit.page.get_by_role("button", name="Ask with 51.0 ms").click()
        visit.page.locator(".outcome").wait_for()
        assert visit.text(".said") == "fourty two"
        assert visit.asked[1]["latency_budget_ms"] == pytest.approx(51.0)


def test_a_load_draws_points_until_it_is_stopped(browser: Browser) -> None:
    engine = StandInEngine()
    engine.seconds = 0.002
    with serving(engine) as address, visiting(browser, address) as visit:
        button = visit.page.locator("#load")
        button.click()
        assert visit.text("#load") == "Stop the load"
        visit.page.locator(".chart .point").nth(7).wait_for(state="attached")  # the second point of each chart
        button.click()
        visit.page.get_by_role("button", name="Start the load").wait_for()
        num_jobs = len(engine.jobs)
        values = visit.page.locator(".chart-value").all_inner_texts()
        assert values[1:3] == ["0 %", "0 %"]  # refused; right, which "fourty two" never is
        assert int(values[0].removesuffix(" %")) > 50  # in time, as the machine allows
        budgets = [asked["latency_budget_ms"] for asked in visit.asked]  # what was left of 1, 1.5, 2 or 4 times 20 ms
        assert min(budgets) <= 20
        assert 40 < max(budgets) <= 80
        assert len({asked["messages"][0]["content"][0]["text"] for asked in visit.asked}) > 5
        visit.page.wait_for_timeout(300)
        assert len(engine.jobs) == num_jobs


def test_a_load_shows_what_is_refused(browser: Browser) -> None:
    engine = StandInEngine()
    # Budgets that none of a busy machine's requests uses up while it waits for a connection of the browser.
    engine.outlook = SimpleNamespace(**vars(engine.outlook) | {"full_p50_ms": 200.0})
    engine.error = OverloadError("the queue is full; try again in 1 s", 1.0, 50.0)
    with serving(engine) as address, visiting(browser, address) as visit:
        assert "its own kinds of questions only" in visit.text("#kinds-note")
        visit.page.locator("#load").click()
        visit.page.locator(".chart .point").first.wait_for(state="attached")
        values = visit.page.locator(".chart-value").all_inner_texts()
        assert values == ["–", "100 %", "–", "–"]
        visit.page.locator("#load").click()
        visit.page.get_by_role("button", name="Start the load").wait_for()


@pytest.mark.usefixtures("without_digits")
def test_without_samples_a_picture_of_ones_own_is_asked_about(browser: Browser, picture: bytes) -> None:
    with serving(StandInEngine()) as address, visiting(browser, address) as visit:
        visit.page.get_by_text("There are no samples: sklearn is not installed").wait_for()
        visit.page.locator("#file").set_input_files({"name": "mine.jpg", "mimeType": "image/jpeg", "buffer": picture})
        visit.page.get_by_alt_text("mine.jpg").wait_for()
        visit.page.locator("#question").fill("How many?")
        visit.ask()
        assert visit.text(".said") == "fourty two"
        assert visit.page.locator("#load").is_disabled()


def test_a_key_is_asked_for_where_the_server_wants_one(browser: Browser) -> None:
    with serving(StandInEngine(), api_key="right") as address, visiting(browser, address) as visit:
        key = visit.page.get_by_label("API key")
        key.fill("wrong")
        key.press("Enter")
        visit.page.locator("#status", has_text="missing or wrong").wait_for()
        key.fill("right")
        key.press("Enter")
        visit.page.locator("#status.ready").wait_for()
        visit.page.locator(".sample").first.click()
        visit.ask()
        assert visit.text(".said") == "fourty two"


def test_a_server_that_is_gone_is_said(browser: Browser) -> None:
    with serving(StandInEngine()) as address, visiting(browser, address) as visit:
        visit.page.context.set_offline(True)
        visit.page.get_by_role("button", name="Ask", exact=True).click()
        visit.page.get_by_text("Nobody answers").wait_for()


def test_all_can_be_done_from_the_keyboard(browser: Browser, address: str) -> None:
    with visiting(browser, address) as visit:
        page, reached = visit.page, []
        for _ in range(30):
            page.keyboard.press("Tab")
            name = page.evaluate("[document.activeElement].map((one) => one.id || one.name || one.tagName)[0]")
            reached.append(name)
            if name == "sample":
                before = page.locator("#question").input_value()
                page.keyboard.press("ArrowRight")
                assert page.locator("#question").input_value() != before
            if name == "send":
                page.keyboard.press("Enter")
                page.locator(".outcome").wait_for()
            if name not in ("budget", "price", "most", "send", "load", "question"):
                continue
            shown = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert shown != "none" or name in ("budget", "price", "most")  # whose thumb has a ring instead
        wanted = ["file", "sample", "question", "kinds-note", "budget", "price", "send", "most", "load"]
        assert [name for name in reached if name in wanted][: len(wanted)] == wanted


def test_it_fits_a_phone_in_both_schemes(browser: Browser, address: str) -> None:
    for scheme in ("light", "dark"):
        settings = {"width": 360, "height": 740, "color_scheme": scheme, "reduced_motion": "reduce"}
        with visiting(browser, address, **settings) as visit:
            visit.ask()
            assert visit.page.evaluate("document.documentElement.scrollWidth") == 360
            assert low_contrasts(visit.page) == []
            durations = "[...document.querySelectorAll('*')].map((one) => getComputedStyle(one).transitionDuration)"
            assert set(visit.page.evaluate(durations)) == {"0s"}


def test_contrast_on_a_wide_screen(browser: Browser, address: str) -> None:
    for scheme in ("light", "dark"):
        with visiting(browser, address, color_scheme=scheme) as visit:
            visit.ask()
            assert low_contrasts(visit.page) == []


def low_contrasts(page: Page) -> list[str]:
    """Texts whose contrast with what is behind them is below 4.5, as WCAG 2.2 counts it."""
    return page.evaluate((Path(__file__).parent / "low_contrasts.js").read_text())

"""The demo as people meet it: a browser that uploads, asks and looks; bad inputs; several users at once; ``explain``."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlprune
from vlprune.evals import synthvqa

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "results" / "demo"
"""Where a person looks at what the browser saw."""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60
"""Seconds for what takes a few on a machine that has nothing else to do."""

pytest.importorskip("gradio", reason="the extra 'demo' is not installed")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """``vlprune demo`` in a process of its own, as a user starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vlprune.cli", "demo", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    said = ""
    for line in server.stdout:
        said += line
        if "The demo is at" in line:
            break
    assert f"http://127.0.0.1:{port}" in said, said
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


# ------------------------------------------------------------------ a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine, and 'make test' found no apt to install one")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """A page of 1280 pixels; it must neither meet an error in its scripts nor ask anybody but the demo for anything."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened, broken, asked = context.new_page(), [], []
    opened.set_default_timeout(1000 * PATIENCE)
    opened.on("pageerror", lambda error: broken.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(url)
    opened.wait_for_selector("#ask")
    yield opened
    context.close()
    assert not broken
    assert not [address for address in asked if not address.startswith((url, "data:", "blob:"))]


def upload(page: Any, path: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(str(path))


def replace_image(page: Any, path: Path) -> None:
    page.get_by_role("button", name=re.compile("^(Clear|Remove)", re.IGNORECASE)).first.click()
    upload(page, path)


def ask(page: Any, question: str) -> None:
    page.locator("#question textarea").first.fill(question)
    page.locator("#ask").click()


def said(page: Any, count: int = 3) -> list[str]:
    """The answers, once all of them have been given."""
    page.wait_for_function(
        "n => document.querySelectorAll('#answers .vp-same, #answers .vp-other').length == n - 1 "
        "&& !document.querySelector('#answers .vp-wait')",
        arg=count,
    )
    return page.locator("#answers .vp-said").all_inner_texts()


def toast(page: Any) -> str:
    """The message of an error, which is closed then."""
    shown = page.locator(".toast-body").last
    shown.wait_for()
    text = shown.inner_text()
    page.locator(".toast-close").last.click()
    page.wait_for_function("() => !document.querySelector('.toast-body')")
    return text


def test_a_person_uploads_asks_and_looks(page: Any, tmp_path: Path):
    example = next(one for one in synthvqa.examples(count=60) if one.kind == "chart")
    path = tmp_path / "mine.png"
    example.image.save(path)
    page.screenshot(path=SHOTS / "1-start.png", full_page=True)
    replace_image(page, path)
    # A method whose stages differ.
    page.locator("#method-a input").fill("mustdrop")
    page.locator("#method-a input").press("Enter")
    page.locator("#budget-a input[type=number]").fill("45")
    ask(page, example.question)
    answers = said(page)
    assert answers[0] == example.answers[0]
    assert all(answers)
    page.wait_for_selector("#costs table")
    table = page.locator("#costs table").inner_text()
    assert "prefill" in table
    assert "KV cache" in table
    assert "mustdrop, 45 %" in table
    assert "30%" in table
    for slider in ("#slider-a", "#slider-b"):
        page.wait_for_function(
            f"() => [...document.querySelectorAll('{slider} img')].filter(i => i.naturalWidth > 300).length >= 2"
        )
    page.locator("#slider-a").scroll_into_view_if_needed()
    before = handle_of(page)
    moved = drag(page)
    assert moved - before > 80, "the handle follows the mouse"
    page.screenshot(path=SHOTS / "2-answered.png", full_page=True)
    choose_stage(page)
    explorer(page)
    by_hand(page)


def handle_of(page: Any) -> float:
    """Where the border between the two pictures of the first slider is."""
    box = page.locator("#slider-a .inner, #slider-a .icon-wrap, #slider-a [role=slider]").first.bounding_box()
    return box["x"] + box["width"] / 2


def drag(page: Any) -> float:
    box = page.locator("#slider-a .inner, #slider-a .icon-wrap, #slider-a [role=slider]").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 120, y, steps=4)
    page.mouse.up()
    return handle_of(page)


def choose_stage(page: Any) -> None:
    """The sliders show the stage that is chosen."""
    first = page.locator("#slider-a img").nth(1).get_attribute("src")
    page.locator("#stage label").nth(1).click()
    page.wait_for_function("was => document.querySelectorAll('#slider-a img')[1].src != was", arg=first)


def explorer(page: Any) -> None:
    """A point names its method and what it is under the cursor."""
    page.get_by_role("tab", name="Explore results").click()
    point = page.locator("#explorer .point").nth(3)
    assert not point.locator(".tip").is_visible()
    point.hover()
    text = point.locator(".tip").text_content()
    assert point.locator(".tip").is_visible()
    assert "budget" in text
    assert "prefill" in text
    page.screenshot(path=SHOTS / "3-explorer.png", full_page=True)


def by_hand(page: Any) -> None:
    """A click drops the tokens under the brush, and the model answers anew."""
    page.get_by_role("tab", name="Pick by hand").click()
    page.get_by_role("button", name="Keep all").click()
    page.wait_for_function("() => document.querySelector('#hand-count').innerText.startsWith('336 of 336')")
    page.wait_for_function("() => document.querySelector('#board img')?.naturalWidth > 300")
    page.locator("#board img").click(position={"x": 150, "y": 150})
    page.wait_for_function("() => document.querySelector('#hand-count').innerText.startsWith('328 of 336')")
    page.screenshot(path=SHOTS / "4-by-hand.png", full_page=True)


def test_bad_inputs_get_a_message(page: Any, tmp_path: Path):
    ask(page, "   ")
    assert "Ask a question first" in toast(page)
    ask(page, "What? " * 100)
    assert "allowed are 500" in toast(page)
    text = tmp_path / "text.png"
    text.write_text("no picture at all")
    replace_image(page, text)
    ask(page, "What is the total?")
    assert "cannot be read as an image" in toast(page)
    enormous = tmp_path / "enormous.png"
    Image.new("1", (9000, 9000)).save(enormous)
    replace_image(page, enormous)
    ask(page, "What is the total?")
    assert "81 megapixels" in toast(page)
    page.screenshot(path=SHOTS / "5-refused.png")


def test_on_a_phone_nothing_is_cut_off(browser: Any, url: str):
    context = browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page = context.new_page()
    page.goto(url)
    page.locator("#ask").click()
    said(page)
    page.wait_for_selector("#costs table")
    page.locator("#slider-b").scroll_into_view_if_needed()
    page.wait_for_function("() => [...document.querySelectorAll('#slider-b img')].some(i => i.naturalWidth > 300)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=SHOTS / "6-phone.png", full_page=True)
    context.close()


# ------------------------------------------------------------------ without a browser


def sent(url: str, path: Path, question: str, methods: Any = ("hired", 30, "uniform", 50)) -> list[str]:
    """Answers to a question, asked through the HTTP interface as the page does it."""
    from gradio_client import Client, handle_file

    client = Client(url, verbose=False, analytics_enabled=False)
    out = client.predict(handle_file(str(path)), question, *methods, api_name="/ask")
    return re.findall(r"vp-said'>(.*?)</div>", out[0])


def test_users_at_once_get_their_own_answers(url: str, tmp_path: Path):
    """Four users, different images, questions and methods; each gets what one alone gets."""
    examples = [one for one in synthvqa.examples(count=60) if one.kind in ("chart", "text", "form")][:4]
    paths = [tmp_path / f"{n}.png" for n in range(4)]
    for one, path in zip(examples, paths, strict=True):
        one.image.save(path)
    methods = [
        ("hired", 30, "uniform", 50),
        ("divprune", 20, "pool", 40),
        ("snapkv", 50, "hired", 60),
        ("fastv", 70, "random", 30),
    ]
    alone = [expected(one, chosen) for one, chosen in zip(examples, methods, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda n: sent(url, paths[n], examples[n].question, methods[n]), range(4)))
    assert together == alone
    assert len({answers[0] for answers in together}) == 4


def expected(example: synthvqa.Example, chosen: Any) -> list[str]:
    """What the model answers in this process, without a demo: unpruned, and with the two methods."""
    from vlprune.evals.answering import make_inputs

    model, processor = tiny()
    inputs = make_inputs(model, processor, [example])

    def answer() -> str:
        out = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()

    answers = [answer()]
    for name, percent in zip(chosen[::2], chosen[1::2], strict=True):
        with vlprune.applied(model, name, budget=percent / 100):
            answers.append(answer())
    return answers


_tiny: list[Any] = []


def tiny() -> Any:
    from vlprune.evals import tinyvlm

    if not _tiny:
        _tiny.append(tinyvlm.load())
    return _tiny[0]


def test_nothing_is_served_from_outside_and_uploads_are_limited(url: str, tmp_path: Path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (32, 32)).save(secret)
    for path in ("/etc/passwd", str(secret), str(ROOT / "README.md"), "../../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}/gradio_api/file={path}", timeout=PATIENCE)
        assert refused.value.code in (403, 404)
    # A path that was not uploaded is not opened either, whoever names it as an upload.
    body = {"data": [{"path": str(secret), "meta": {"_type": "gradio.FileData"}}, "What?", "hired", 30, "uniform", 30]}
    assert "error" in called(url, body)
    boundary = "x" * 20
    form = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'.encode()
    large = form + b"0" * (11 * 2**20) + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with pytest.raises((urllib.error.HTTPError, urllib.error.URLError)) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{url}/gradio_api/upload", large, headers), timeout=PATIENCE)
    assert getattr(refused.value, "code", 413) == 413


def called(url: str, body: Any) -> str:
    """The stream of events of a call."""
    request = urllib.request.Request(
        f"{url}/gradio_api/call/ask", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    event = json.load(urllib.request.urlopen(request, timeout=PATIENCE))["event_id"]
    return urllib.request.urlopen(f"{url}/gradio_api/call/ask/{event}", timeout=PATIENCE).read().decode()


def test_an_answer_takes_less_than_three_seconds(url: str, tmp_path: Path):
    """Processor time of one request, all three answers and their pictures; other work on the machine does not count."""
    import psutil

    path = tmp_path / "mine.png"
    next(iter(synthvqa.examples(count=1))).image.save(path)
    sent(url, path, "What does the red sign say?")
    (server,) = [one for one in psutil.process_iter(["cmdline"]) if url.rpartition(":")[2] in (one.info["cmdline"] or [])]
    before = sum(server.cpu_times()[:2])
    sent(url, path, "What does the red sign say?")
    assert sum(server.cpu_times()[:2]) - before < 3


def test_explain_prints_the_report_and_saves_the_picture(tmp_path: Path):
    from typer.testing import CliRunner

    from vlprune.cli import COMMANDS
    from vlprune.shell import application

    path, out = tmp_path / "mine.png", tmp_path / "pictures" / "explained.png"
    example = next(iter(synthvqa.examples(count=1)))
    example.image.save(path)
    app, runner = application(COMMANDS), CliRunner()
    arguments = ["explain", str(path), example.question, "--budget", "0.3", "--out", str(out)]
    shown = runner.invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "visual tokens into the LLM: 100 of 336" in shown.output
    assert example.answers[0] in shown.output
    assert Image.open(out).width > 600
    told = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert (told["unpruned"], told["entering"], told["total"]) == (example.answers[0], 100, 336)
    assert "layout" not in told["images"][0]
    for wrong, message in (
        (["explain", str(tmp_path / "none.png"), "What?"], "there is no file"),
        (["explain", str(path), " "], "Ask a question first"),
        (["explain", str(path), "What?", "--method", "nonsense"], "unknown method"),
    ):
        failed = runner.invoke(app, wrong)
        assert failed.exit_code == 2
        assert message in failed.output


def test_tokens_under_the_brush():
    from vlprune.demos.by_hand import near, toggled
    from vlprune.integrations.layouts import tiles_in_a_row
    from vlprune.visualize import View

    layout = tiles_in_a_row(1, (4, 6))
    view = View(layout.regions[0], (0, 0, 60, 40))
    assert near([view], (15, 25), 1) == {2 * 6 + 1}
    assert near([view], (10, 20), 2) == {6, 7, 12, 13}
    assert near([view], (61, 20), 2) == set()
    assert near([view], (1, 1), 3) == {0, 1, 2, 6, 7, 8, 12, 13, 14}
    assert toggled(range(4), {1, 2}) == [0, 3]
    assert toggled([0, 1], {1, 2}) == [0, 1, 2]


def test_what_people_write_is_escaped():
    from vlprune.demos import page as html
    from vlprune.demos.answers import Answer

    cards = html.answers(["<b>", "x"], ["<script>", None], 1)
    assert "<script>" not in cards
    assert "&lt;script&gt;" in cards
    found = [Answer("a", {"tokens": 10, "prefill_ms": 2.0}), Answer("b", {"tokens": 5, "prefill_ms": 4.0})]
    table = html.costs(["none", "<i>"], found)
    assert "<i>" not in table
    assert "50%" in table
    assert "vp-worse" in table


def test_the_drawing_of_results_names_every_point():
    from vlprune.demos import explorer

    for name, summary in explorer.results().items():
        (benchmark,) = summary["benchmarks"].values()
        for number in explorer.numbers(summary):
            for against in explorer.AXES:
                drawn = explorer.chart(summary, number, against)
                pruned = [one for one in benchmark["settings"] if one["method"] != "none"]
                assert drawn.count("class='point'") == len(pruned), name
                for one in pruned:
                    assert f"{one['method']}, budget {one['budget']:g}" in drawn

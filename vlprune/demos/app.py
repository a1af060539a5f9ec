"""The page: three tabs around one model. Needs gradio, which the extra ``demo`` brings."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Default

import vlprune
from vlprune.demos import explorer, page, requests
from vlprune.demos.answers import Answerer, Question
from vlprune.demos.by_hand import ByHand, near, toggled
from vlprune.demos.compare import ALL, SIDE, compare, message, pictures
from vlprune.demos.examples import written
from vlprune.errors import VLPruneError
from vlprune.visualize import show

STYLE = Path(__file__).parent / "style.css"
FONT, MONOSPACED = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
"""Fonts of the reader's machine: themes would fetch theirs from the net."""
MOST_WAITING = 32
"""Requests that queue up before further ones are refused."""
KEPT_FOR = 3600
"""Seconds until uploaded files are deleted."""


def build(answerer: Answerer) -> gr.Blocks:
    """The page around a model."""
    names = usable(answerer)
    folder = Path(tempfile.mkdtemp(prefix="vlprune-demo-"))
    samples = written(folder)
    with gr.Blocks(title="vlprune", analytics_enabled=False, delete_cache=(KEPT_FOR, KEPT_FOR)) as blocks:
        gr.HTML(_head(answerer))
        with gr.Tabs():
            with gr.Tab("Compare", id="compare"):
                _compare_tab(answerer, names, samples)
            with gr.Tab("Pick by hand", id="hand"):
                _hand_tab(answerer, names, samples)
            with gr.Tab("Explore results", id="explore"):
                _explore_tab()
    blocks.queue(max_size=MOST_WAITING, default_concurrency_limit=8)
    return blocks


def launch(blocks: gr.Blocks, host: str, port: int | None, **options: Any) -> Any:
    """Serves the page; nothing of it comes from, or goes to, another machine."""
    theme = Default(primary_hue="teal", neutral_hue="slate", font=FONT, font_mono=MONOSPACED)
    quiet: Any = {"share": False, "footer_links": [], "ssr_mode": False, "run_history": False, "pwa": False}
    return blocks.launch(
        server_name=host,
        server_port=port,
        theme=theme,
        # In the head as it is: given as css, its selectors would be put below the page's container, media queries aside.
        head=f"<style>{STYLE.read_text(encoding='utf-8')}</style>",
        max_file_size=requests.UPLOAD,
        allowed_paths=[],
        enable_monitoring=False,
        **{**quiet, **options},
    )


def usable(answerer: Answerer) -> list[str]:
    """The methods that this model can have."""
    found = []
    for name in vlprune.methods():
        try:
            with answerer.turn, vlprune.applied(answerer.loaded.model, name):
                found.append(name)
        except VLPruneError:
            continue
    return found


def _head(answerer: Answerer) -> str:
    device = answerer.loaded.model.device
    return (
        "<div class='vp-head'><h1>vlprune: fewer visual tokens, the same model</h1>"
        "<p>Ask about an image. See what each method keeps of it, whether the answer stays, and what that saves.</p>"
        f"<span class='vp-chip'>{escape(answerer.loaded.name)} on {escape(str(device))}</span></div>"
    )


# ------------------------------------------------------------------ compare


def _compare_tab(answerer: Answerer, names: list[str], samples: list[tuple[str, str]]) -> None:
    second = "divprune" if "divprune" in names else names[0]
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            image, question = _asking(samples, 250, "question")
            ask = gr.Button("Ask", variant="primary", elem_id="ask")
        with gr.Column(scale=6, min_width=300):
            with gr.Row():
                with gr.Group():
                    first_name = gr.Dropdown(names, value="hired", label="method A", elem_id="method-a")
                    first_budget = _budget("a")
                with gr.Group():
                    second_name = gr.Dropdown([requests.UNPRUNED, *names], value=second, label="method B", elem_id="method-b")
                    second_budget = _budget("b")
            cards = gr.HTML(page.answers([requests.UNPRUNED, "method A", "method B"], [None] * 3, 0), elem_id="answers")
            table = gr.HTML(page.note("Ask, and what each answer cost will stand here."), elem_id="costs")
    drawn = gr.State(None)
    with gr.Column(visible=False, elem_id="pictures") as results:
        stage = gr.Radio([ALL], value=ALL, label="what is kept", elem_id="stage")
        with gr.Row():
            sliders = [
                gr.ImageSlider(label=f"method {letter}", interactive=False, elem_id=f"slider-{letter.lower()}", max_height=560)
                for letter in "AB"
            ]
        gr.HTML(page.LEGEND)
        with gr.Row():
            sheets = [_sheet(letter) for letter in "AB"]
        gr.HTML(page.note(NOTE))
    inputs = [image, question, first_name, first_budget, second_name, second_budget]
    outputs = [cards, results, stage, *sliders, table, *sheets, drawn]

    def on_ask(path: Any, text: Any, a: str, a_budget: float, b: str, b_budget: float) -> Iterator[Any]:
        skip = gr.skip()
        try:
            for now in compare(answerer, path, text, [(a, a_budget), (b, b_budget)]):
                if not now.pictures:
                    yield now.cards, *[skip] * 8
                    continue
                stages = list(dict.fromkeys(stage for one in now.pictures for stage in one.kept))
                yield (
                    now.cards,
                    gr.update(visible=True),
                    gr.update(choices=stages, value=ALL),
                    *(
                        gr.update(value=one.pair(ALL), label=name)
                        for one, name in zip(now.pictures, now.names[1:], strict=True)
                    ),
                    page.costs(now.names, now.answers),
                    *(
                        one.sheet(f"{name}: stages, merged tokens, scores")
                        for one, name in zip(now.pictures, now.names[1:], strict=True)
                    ),
                    now.pictures,
                )
        except Exception as error:
            raise gr.Error(message(error), print_exception=False) from error

    def on_stage(name: str, found: Any) -> Any:
        return [one.pair(name) for one in found] if found else [gr.skip()] * 2

    gr.on([ask.click, question.submit], on_ask, inputs, outputs, api_name="ask", show_progress="hidden")
    stage.input(on_stage, [stage, drawn], sliders, show_progress="hidden", api_visibility="private")


NOTE = (
    "Budgets are shares of the image's visual tokens: those that enter the LLM, or, for methods that drop inside it, their "
    "mean over its layers. Times are of this machine and one image: medians of up to five prefills, the mean of an answer's "
    "decoding. What takes milliseconds shows more overhead than a large model does. In merged groups each colour is one "
    "token; scores are the attention that the method asks for."
)


def _budget(letter: str) -> gr.Slider:
    return gr.Slider(5, 100, value=30, step=1, label="budget, %", min_width=120, elem_id=f"budget-{letter}")


def _asking(samples: list[tuple[str, str]], height: int, name: str) -> tuple[gr.Image, gr.Textbox]:
    """An image and a question about it, and examples of both."""
    image = gr.Image(samples[0][0], label="image", type="filepath", sources=["upload", "clipboard"], height=height)
    # The path of the file, of which gradio has made sure that it was uploaded: it is opened with messages of our own.
    image.preprocess = _path
    shown = gr.Dataset(
        components=[gr.Image(render=False)],
        samples=[[path] for path, _ in samples],
        type="index",
        layout="gallery",
        label="examples",
    )
    question = gr.Textbox(samples[0][1], label="question", max_lines=3, max_length=2000, elem_id=name)
    shown.click(lambda n: samples[n], shown, [image, question], show_progress="hidden", api_visibility="private")
    return image, question


def _path(payload: Any) -> str | None:
    return None if payload is None else payload.path


def _sheet(letter: str) -> gr.Image:
    return gr.Image(
        show_label=False, interactive=False, elem_id=f"sheet-{letter.lower()}", min_width=300, buttons=["fullscreen"]
    )


# ------------------------------------------------------------------ by hand


def _hand_tab(answerer: Answerer, names: list[str], samples: list[tuple[str, str]]) -> None:
    gr.HTML(
        page.note("Click on the image: tokens under the brush leave, or come back, and the model answers with what is left.")
    )
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            source, question = _asking(samples, 200, "hand-question")
            with gr.Row():
                everything, nothing = gr.Button("Keep all", size="sm"), gr.Button("Drop all", size="sm")
            with gr.Row():
                start = gr.Dropdown(names, value="hired", label="or start from", min_width=120)
                budget = _budget("hand")
            load = gr.Button("Take its choice", size="sm")
            brush = gr.Slider(1, 8, value=2, step=1, label="brush, tokens a side")
            part = gr.Radio(["both", "crops", "thumbnail"], value="both", label="what the brush picks")
        with gr.Column(scale=5, min_width=300):
            answer = gr.HTML(page.answers(["all tokens", "your choice"], [None, None], 0), elem_id="hand-answers")
            board = gr.Image(
                label="kept tokens", interactive=False, type="pil", elem_id="board", elem_classes="vp-pick", buttons=[]
            )
            gr.HTML(page.LEGEND.partition(" Drag")[0])
            count = gr.HTML(elem_id="hand-count")
    kept = gr.State(None)
    shown = [answer, board, count, kept]

    def redraw(path: Any, text: Any, tokens: list[int] | None) -> Any:
        try:
            asked = Question(requests.image(path), requests.question(text))
            full = answerer.answer(asked, None)
            mine = answerer.answer(asked, ByHand(tokens=None if tokens is None else tuple(tokens)))
            picture = pictures(answerer.loaded.processor, asked.image, mine).kept[ALL]
        except Exception as error:
            raise gr.Error(message(error), print_exception=False) from error
        assert mine.report is not None
        told = f"{mine.report.entering} of {mine.report.total} visual tokens"
        cards = page.answers(["all tokens", "your choice"], [full.text, mine.text], 2)
        return cards, picture, page.note(told), tokens

    def on_click(path: Any, text: Any, tokens: list[int] | None, size: int, which: str, event: gr.SelectData) -> Any:
        try:
            asked = Question(requests.image(path), requests.question(text))
            report = answerer.answer(asked, ByHand()).report
            assert report is not None
            if len(report.images) != 1:
                raise VLPruneError("This model takes each tile for an image of its own; picking by hand needs one image.")
            scene = show.Scene.of(asked.image, report, None, answerer.loaded.processor, SIDE)
            views = [view for view in scene.views if which == "both" or view.name in (which, "")]
            picked = near(views, (event.index[0], event.index[1]), int(size))
            before = range(report.total) if tokens is None else tokens
        except Exception as error:
            raise gr.Error(message(error), print_exception=False) from error
        return redraw(path, text, toggled(before, picked))

    def on_load(path: Any, text: Any, name: str, percent: float) -> Any:
        try:
            asked = Question(requests.image(path), requests.question(text))
            report = answerer.answer(asked, requests.method(name, percent)).report
            assert report is not None
        except Exception as error:
            raise gr.Error(message(error), print_exception=False) from error
        return redraw(path, text, report.images[0].kept)

    quiet: Any = {"show_progress": "minimal", "api_visibility": "private"}
    board.select(on_click, [source, question, kept, brush, part], shown, **quiet)
    everything.click(lambda path, text: redraw(path, text, None), [source, question], shown, **quiet)
    nothing.click(lambda path, text: redraw(path, text, []), [source, question], shown, **quiet)
    load.click(on_load, [source, question, start, budget], shown, **quiet)
    question.submit(redraw, [source, question, kept], shown, **quiet)
    source.change(lambda path, text: redraw(path, text, None), [source, question], shown, **quiet)


# ------------------------------------------------------------------ explorer


def _explore_tab() -> None:
    found = explorer.results()
    if not found:
        gr.HTML(page.note("No results came with this installation. 'vlprune eval' measures some."))
        return
    first = next(iter(found))
    with gr.Row():
        model = gr.Dropdown(list(found), value=first, label="model", min_width=160)
        number = gr.Dropdown(explorer.numbers(found[first]), label="score", min_width=160)
        against = gr.Radio([("visual tokens", "tokens"), ("prefill time", "time")], value="tokens", label="against")
    drawing = gr.HTML(explorer.chart(found[first], explorer.numbers(found[first])[0]), elem_id="explorer")

    def on_change(name: str, score: str, axis: str) -> str:
        return explorer.chart(found[name], score, axis)

    for control in (model, number, against):
        control.change(on_change, [model, number, against], drawing, show_progress="hidden", api_visibility="private")

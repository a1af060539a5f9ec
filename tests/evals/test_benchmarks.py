"""Every benchmark reads local files of its data set's real schema through the real loading code, offline."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from datasets import Dataset, Features, Image, List, Value, load_dataset_builder
from PIL import Image as Pictures

from vlprune.errors import OptionError
from vlprune.evals import benchmarks
from vlprune.evals.benchmarks.base import Benchmark, DataError, Example, ImageError, Row
from vlprune.evals.benchmarks.source import Source, origin_of

TEXT, NUMBER = Value("string"), Value("int64")
TEN = ["net"] * 4 + ["A net"] * 3 + ["mesh", "fence", "tennis net"]


def png(colour: str = "red", size: tuple[int, int] = (6, 4)) -> dict[str, Any]:
    buffer = io.BytesIO()
    Pictures.new("RGB", size, colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{colour}.png"}


def person(answer: str, number: int) -> dict[str, Any]:
    return {"answer": answer, "answer_confidence": "yes", "answer_id": number}


# ------------------------------------------------------------------ the real schemas

VQAV2 = {
    "question_type": TEXT,
    "multiple_choice_answer": TEXT,
    "answers": List({"answer": TEXT, "answer_confidence": TEXT, "answer_id": NUMBER}),
    "image_id": NUMBER,
    "answer_type": TEXT,
    "question_id": NUMBER,
    "question": TEXT,
    "image": Image(),
}
TEXTVQA = {
    "image_id": TEXT,
    "question_id": Value("int32"),
    "question": TEXT,
    "question_tokens": List(TEXT),
    "image": Image(),
    "image_width": Value("int32"),
    "image_height": Value("int32"),
    "flickr_original_url": TEXT,
    "answers": List(TEXT),
    "image_classes": List(TEXT),
    "set_name": TEXT,
    "ocr_tokens": List(TEXT),
}
GQA = {
    "id": TEXT,
    "imageId": TEXT,
    "question": TEXT,
    "answer": TEXT,
    "fullAnswer": TEXT,
    "isBalanced": Value("bool"),
}
POPE = {
    "id": TEXT,
    "question_id": TEXT,
    "question": TEXT,
    "answer": TEXT,
    "image_source": TEXT,
    "image": Image(),
    "category": TEXT,
}
MME = {"question_id": TEXT, "image": Image(), "question": TEXT, "answer": TEXT, "category": TEXT}
SCIENCEQA = {
    "image": Image(),
    "question": TEXT,
    "choices": List(TEXT),
    "answer": Value("int8"),
    "hint": TEXT,
    "task": TEXT,
    "grade": TEXT,
    "subject": TEXT,
    "topic": TEXT,
    "category": TEXT,
    "skill": TEXT,
    "lecture": TEXT,
    "solution": TEXT,
}
DOCVQA = {
    "questionId": TEXT,
    "question": TEXT,
    "question_types": List(TEXT),
    "image": Image(),
    "docId": NUMBER,
    "ucsf_document_id": TEXT,
    "ucsf_document_page_no": TEXT,
    "answers": List(TEXT),
    "data_split": TEXT,
}
CHARTQA = {"type": TEXT, "question": TEXT, "answer": TEXT, "image": Image()}
MMBENCH = {
    "index": NUMBER,
    "question": TEXT,
    "hint": TEXT,
    "answer": TEXT,
    "A": TEXT,
    "B": TEXT,
    "C": TEXT,
    "D": TEXT,
    "category": TEXT,
    "image": Image(),
    "source": TEXT,
    "L2-category": TEXT,
    "comment": TEXT,
    "split": TEXT,
}


def mme(image: str, question: str, answer: str, category: str = "OCR") -> dict[str, Any]:
    asked = f"{question} Please answer yes or no."
    return {"question_id": image, "image": png(), "question": asked, "answer": answer, "category": category}


def pope(number: int, category: str, answer: str) -> dict[str, Any]:
    question = "Is there a snowboard in the image?"
    return {"question_id": str(number), "question": question, "answer": answer, "image": png(), "category": category}


def mmbench(index: int, answer: str, *options: str | None, hint: str | None = None, category: str = "ocr") -> dict[str, Any]:
    letters = dict(zip("ABCD", (*options, None, None), strict=False))
    row = {"index": index, "question": "Which?", "hint": hint, "answer": answer, "category": category, "image": png()}
    return row | letters | {"L2-category": "perception", "split": "dev"}


ROWS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "vqav2": (
        VQAV2,
        [
            {
                "question_type": "what is",
                "multiple_choice_answer": "net",
                "answers": [person(answer, number) for number, answer in enumerate(TEN, start=1)],
                "image_id": 262148,
                "answer_type": "other",
                "question_id": 262148000 + number,
                "question": "What is behind him?",
                "image": png(),
            }
            for number in range(3)
        ],
    ),
    "textvqa": (
        TEXTVQA,
        [
            {
                "question_id": 34602 + number,
                "question": "what is the brand of this CAMERA?",
                "image": png(),
                "answers": TEN,
                "ocr_tokens": ["DAKOTA", "digital"],
            }
            for number in range(3)
        ],
    ),
    "gqa": (
        GQA,
        [
            {"id": f"2020{number}", "imageId": f"n{number % 2}", "question": "Is it overcast?", "answer": "no"}
            for number in range(3)
        ],
    ),
    "pope": (POPE, [pope(1, "random", "yes"), pope(2, "random", "no"), pope(1, "popular", "yes")]),
    "mme": (MME, [mme("0001.png", "Is it a?", "Yes"), mme("0001.png", "Is it b?", "No"), mme("0002.png", "Is it a?", "Yes")]),
    "scienceqa": (
        SCIENCEQA,
        [
            {"image": png(), "question": "Which is solid?", "choices": ["air", "rock"], "answer": 1, "hint": ""},
            {"image": png(), "question": "Which?", "choices": ["a", "b", "c"], "answer": 0, "hint": "Look."},
            {"image": png(), "question": "Which?", "choices": ["a", "b", "c"], "answer": 2, "hint": "Look."},
        ],
    ),
    "docvqa": (
        DOCVQA,
        [
            {"questionId": str(number), "question": "What is the date?", "image": png(), "answers": ["1/8/93", "Jan 8"]}
            for number in range(3)
        ],
    ),
    "chartqa": (
        CHARTQA,
        [
            {"type": kind, "question": "How many?", "answer": answer, "image": png()}
            for kind, answer in [("human_test", "14"), ("human_test", "Yes"), ("augmented_test", "0.57")]
        ],
    ),
    "mmbench": (
        MMBENCH,
        [
            mmbench(7, "A", "cat", "dog"),
            mmbench(9, "B", "one", "two", "three", hint="Count."),
            mmbench(1_000_007, "B", "dog", "cat"),
            mmbench(1_000_009, "A", "two", "three", "one", hint="Count."),
            mmbench(2_000_009, "C", "three", "one", "two", hint="Count."),
        ],
    ),
}
SPLITS = {"vqav2": "validation", "textvqa": "validation", "gqa": "testdev", "docvqa": "validation", "mmbench": "dev"}
CONFIGS = {"gqa": "testdev_balanced_instructions", "scienceqa": "ScienceQA-IMG", "docvqa": "DocVQA", "mmbench": "en"}


def write(folder: Path, schema: dict[str, Any], rows: list[dict[str, Any]], split: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    columns = {name: [row.get(name) for row in rows] for name in schema}
    Dataset.from_dict(columns, features=Features(schema)).to_parquet(
        folder / f"{split}-00000-of-00001.parquet", batch_size=100
    )


def copy_of(folder: Path, name: str, rows: list[dict[str, Any]] | None = None, drop: str = "") -> Path:
    """A local copy of a data set, as a clone of its repository without the head of its README."""
    schema, own = ROWS[name]
    schema = {column: kind for column, kind in schema.items() if column != drop}
    split = SPLITS.get(name, "test")
    write(folder / CONFIGS.get(name, ""), schema, own if rows is None else rows, split)
    if name == "gqa":
        images = [{"id": "n0", "image": png("red")}, {"id": "n1", "image": png("blue")}]
        write(folder / "testdev_balanced_images", {"id": TEXT, "image": Image()}, images, split)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is prepared goes into a folder of its own, and the hub is never asked."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def local(tmp_path: Path) -> Callable[..., Benchmark]:
    def make(name: str, rows: list[dict[str, Any]] | None = None, drop: str = "", **options: Any) -> Benchmark:
        return benchmarks.find(name, path=str(copy_of(tmp_path / "copy", name, rows, drop)), **options)

    return make


def answered(benchmark: Benchmark, examples: list[Example], predictions: list[str | None]) -> list[Row]:
    """Rows as a run writes them, once through JSON."""
    rows = [
        {
            "id": one.id,
            "category": one.category,
            "answers": one.answers,
            "details": one.details,
            "prediction": prediction,
            "score": benchmark.score(one, prediction),
        }
        for one, prediction in zip(examples, predictions, strict=True)
    ]
    return json.loads(json.dumps(rows))


# ------------------------------------------------------------------ what the model is shown

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
SNAPSHOTS = {
    "vqav2": [("262148000", "other", "What is behind him?" + SHORT, tuple(TEN))],
    "textvqa": [("34602", "", "What is the brand of this camera?" + SHORT, tuple(TEN))],
    "gqa": [("20200", "", "Is it overcast?" + SHORT, ("no",))],
    "pope": [
        ("random-1", "random", "Is there a snowboard in the image?" + SHORT, ("yes",)),
        ("random-2", "random", "Is there a snowboard in the image?" + SHORT, ("no",)),
    ],
    "mme": [
        ("0001.png", "OCR", "Is it a?" + SHORT, ("yes",)),
        ("0001.png#2", "OCR", "Is it b?" + SHORT, ("no",)),
    ],
    "scienceqa": [
        ("0", "", "Which is solid?\nA. air\nB. rock" + LETTER, ("B",)),
        ("1", "", "Context: Look.\nWhich?\nA. a\nB. b\nC. c" + LETTER, ("A",)),
    ],
    "docvqa": [("0", "", "What is the date?" + SHORT, ("1/8/93", "Jan 8"))],
    "chartqa": [("0", "human_test", "How many?\nAnswer the question with a single word.", ("14",))],
    "mmbench": [
        ("7", "ocr", "Which? There are several options:\nA. cat\nB. dog\n" + LETTER, ("A",)),
        ("1000007", "ocr", "Which? There are several options:\nA. dog\nB. cat\n" + LETTER, ("B",)),
        ("9", "ocr", "Count. Which? There are several options:\nA. one\nB. two\nC. three\n" + LETTER, ("B",)),
    ],
}


@pytest.mark.parametrize("name", SNAPSHOTS)
@pytest.mark.parametrize("limit", [None, 3])
def test_prompts_are_those_of_lmms_eval(local: Callable[..., Benchmark], name: str, limit: int | None):
    """Written from the prompts that lmms-eval 0.7.3 makes of these rows by default."""
    examples = local(name).examples(limit)
    expected = SNAPSHOTS[name]
    assert [(one.id, one.category, one.question, one.answers) for one in examples][: len(expected)] == expected
    assert len({one.id for one in examples}) == len(examples) == (limit or len(ROWS[name][1]))
    assert all(one.image.size == (6, 4) for one in examples)
    json.dumps([one.details for one in examples])


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_streamed_and_prepared_rows_are_the_same(local: Callable[..., Benchmark], name: str):
    benchmark = local(name)
    whole, streamed = benchmark.examples(), benchmark.examples(len(ROWS[name][1]))
    assert whole == streamed
    assert [one.fingerprint for one in whole] == [one.fingerprint for one in streamed]
    assert [one.id for one in benchmark.examples(1)] == [whole[0].id]


def test_all_benchmarks_are_covered():
    assert set(SNAPSHOTS) | {"synthvqa", "own"} == set(benchmarks.NAMES)


def test_images_of_gqa_are_joined_by_id(local: Callable[..., Benchmark]):
    colours = [one.image.getpixel((0, 0)) for one in local("gqa").examples()]
    assert colours == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]


def test_tokens_of_ocr_are_shown_on_request(local: Callable[..., Benchmark]):
    benchmark = local("textvqa", ocr=True)
    assert "camera?\nReference OCR token: DAKOTA, digital\nAnswer the" in benchmark.examples(1)[0].question
    assert benchmark.version.endswith("OCR tokens")


# ------------------------------------------------------------------ where data come from


def test_version_names_the_data(local: Callable[..., Benchmark]):
    assert local("docvqa").version == "copy, DocVQA, validation"


def test_a_single_file_will_do(tmp_path: Path):
    copy_of(tmp_path, "textvqa")
    benchmark = benchmarks.find("textvqa", path=str(tmp_path / "validation-00000-of-00001.parquet"))
    assert len(benchmark.examples()) == 3


def test_the_head_of_a_clone_tells_its_files(tmp_path: Path):
    """As in the repositories: configurations in their README, with other folders than their names."""
    schema, rows = ROWS["docvqa"]
    write(tmp_path / "data", schema, rows, "anything")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: DocVQA\n  data_files:\n  - split: validation\n    path: data/anything-*\n---\n"
    )
    assert len(benchmarks.find("docvqa", path=str(tmp_path)).examples()) == 3


def test_another_split(tmp_path: Path):
    write(tmp_path, *ROWS["vqav2"], "train")
    assert len(benchmarks.find("vqav2", path=str(tmp_path), split="train").examples(2)) == 2


@pytest.mark.parametrize("limit", [None, 1])
def test_missing_split_names_those_that_are_there(tmp_path: Path, limit: int | None):
    write(tmp_path, *ROWS["vqav2"], "train")
    with pytest.raises(DataError, match=r"validation.*train"):
        benchmarks.find("vqav2", path=str(tmp_path)).examples(limit)


def test_no_such_folder(tmp_path: Path):
    with pytest.raises(DataError, match="no such file or folder"):
        benchmarks.find("pope", path=str(tmp_path / "nowhere")).examples()


@pytest.mark.parametrize("limit", [None, 2])
def test_the_offline_cache_is_used_under_the_older_name(tmp_path: Path, limit: int | None):
    """What was downloaded once, as lmms-lab/textvqa, is found without the hub."""
    write(tmp_path / "textvqa", *ROWS["textvqa"], "validation")
    prepared = load_dataset_builder(str(tmp_path / "textvqa"))
    prepared.download_and_prepare()
    cached = Path(datasets.config.HF_DATASETS_CACHE) / "lmms-lab___textvqa" / "default" / "0.0.0" / ("0" * 40)
    shutil.copytree(prepared.cache_dir, cached)
    info = json.loads((cached / "dataset_info.json").read_text())
    (cached / "dataset_info.json").write_text(json.dumps(info | {"config_name": "default"}))
    benchmark = benchmarks.find("textvqa")
    assert len(benchmark.examples(limit)) == (limit or 3)
    assert benchmark.version == f"lmms-lab/textvqa@{'0' * 40}, validation"


@pytest.mark.parametrize(
    ("files", "hashed", "origin"),
    [
        ({"test": [f"hf://datasets/lmms-lab/GQA@{'5' * 40}/a/test-0.parquet"]}, "", f"lmms-lab/GQA@{'5' * 40}, a, test"),
        (None, "7" * 40, f"lmms-lab/GQA@{'7' * 40}, a, test"),
        (None, None, "lmms-lab/GQA@v1, a, test"),
    ],
)
def test_revision_of_what_is_read(files: Any, hashed: str | None, origin: str):
    """Of addresses such as the hub's, else the one that the cache has noted, else what was asked for."""
    builder = SimpleNamespace(config=SimpleNamespace(data_files=files), hash=hashed)
    assert origin_of("lmms-lab/GQA", builder, Source("GQA", "a", "test", revision="v1")) == origin


def test_without_the_hub_both_names_were_tried():
    with pytest.raises(DataError, match=r"lmms-lab-encoder/POPE.*lmms-lab/POPE.*path=FOLDER"):
        benchmarks.find("pope").examples(1)


def test_unknown_names_and_options():
    with pytest.raises(DataError, match="textvq.*textvqa"):
        benchmarks.find("textvq")
    with pytest.raises(OptionError, match="no option colour: there are split, path, revision"):
        benchmarks.find("pope", colour="red")


# ------------------------------------------------------------------ data that are not as they should be


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize(
    ("name", "column"),
    [("textvqa", "image"), ("textvqa", "answers"), ("gqa", "imageId"), ("mmbench", "hint"), ("pope", "category")],
)
def test_missing_column(local: Callable[..., Benchmark], name: str, column: str, limit: int | None):
    with pytest.raises(DataError, match=rf"copy.*no column '{column}'; there are .*question"):
        local(name, drop=column).examples(limit)


@pytest.mark.parametrize(
    ("name", "column", "value", "allowed"),
    [
        ("textvqa", "answers", [], "at least one text"),
        ("textvqa", "answers", None, "at least one text"),
        ("vqav2", "answers", None, "'answer' each"),
        ("vqav2", "answers", [], "'answer' each"),
        ("docvqa", "answers", None, "at least one text"),
        ("docvqa", "question", None, "a text"),
        ("pope", "answer", "maybe", "yes or no"),
        ("mme", "answer", "", "yes or no"),
        ("scienceqa", "answer", 7, "one of 2 choices"),
        ("scienceqa", "choices", [], "at least one text"),
        ("mmbench", "answer", None, "a text"),
        ("mmbench", "answer", "D", "one of the options A, B"),
    ],
)
def test_values_that_cannot_be_scored(local: Callable[..., Benchmark], name: str, column: str, value: Any, allowed: str):
    rows = [ROWS[name][1][0] | {column: value}]
    with pytest.raises(DataError, match=rf"copy.* row 0: column '{column}' must hold .*{allowed}.*, and holds"):
        local(name, rows).examples()


def test_no_rows(local: Callable[..., Benchmark]):
    with pytest.raises(DataError, match="there are no rows"):
        local("chartqa", []).examples(5)


def test_image_that_is_not_among_gqas(local: Callable[..., Benchmark]):
    with pytest.raises(DataError, match="no image 'n7' among the 2"):
        local("gqa", [ROWS["gqa"][1][0] | {"imageId": "n7"}]).examples()


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("image", [{"bytes": b"\x89PNG\r\n\x1a\n corrupt", "path": "a.png"}, None])
def test_a_bad_image_fails_when_its_turn_comes(local: Callable[..., Benchmark], image: Any, limit: int | None):
    rows = [ROWS["chartqa"][1][0], ROWS["chartqa"][1][1] | {"image": image}, ROWS["chartqa"][1][2]]
    examples = local("chartqa", rows).examples(limit)
    assert [examples[place].image.size for place in (0, 2)] == [(6, 4)] * 2
    with pytest.raises(ImageError):
        examples[1].image  # noqa: B018


@pytest.mark.parametrize("size", [(1, 1), (8000, 50)])
def test_odd_sizes_and_long_questions(local: Callable[..., Benchmark], size: tuple[int, int]):
    rows = [ROWS["docvqa"][1][0] | {"image": png(size=size), "question": "why " * 2500}]
    (example,) = local("docvqa", rows).examples()
    assert example.image.size == size
    assert len(example.question) > 10_000


# ------------------------------------------------------------------ scores and summaries


def test_vqav2_has_both_conventions(local: Callable[..., Benchmark]):
    """Seven say net once articles are gone: 1. All ten equal, 'Net' for 'net': right, but not for the official script."""
    benchmark = local("vqav2")
    examples = benchmark.examples()
    assert [benchmark.score(examples[0], said) for said in ("net", "The net.", "mesh", "dog")] == [1, 1, pytest.approx(0.3), 0]
    same = [ROWS["vqav2"][1][0] | {"answers": [person("net", number) for number in range(10)]}]
    benchmark = local("vqav2", same)
    summary = benchmark.summary(answered(benchmark, benchmark.examples(), ["Net"]))
    assert {name: number.value for name, number in summary.numbers.items()} == {"VQA accuracy": 1.0, "official script": 0.0}
    assert (summary.headline, set(summary.categories)) == ("VQA accuracy", {"other"})


def test_textvqa(local: Callable[..., Benchmark]):
    benchmark = local("textvqa")
    examples = benchmark.examples()
    summary = benchmark.summary(answered(benchmark, examples, ["Net?", "fence", None]))
    assert summary.main.value == pytest.approx((1 + 0.3) / 3)
    assert (summary.failed, summary.categories) == (1, {})


def test_gqa_has_both_conventions(local: Callable[..., Benchmark]):
    benchmark = local("gqa")
    summary = benchmark.summary(answered(benchmark, benchmark.examples(), ["No.", "no!", "not"]))
    assert {name: number.value for name, number in summary.numbers.items()} == pytest.approx(
        {"exact match": 2 / 3, "official script": 1 / 3}
    )


def test_docvqa(local: Callable[..., Benchmark]):
    """'jan  9' is one of five characters away from 'Jan 8', of six raw ones: 5/6, and 4/5 by folded lengths."""
    benchmark = local("docvqa")
    summary = benchmark.summary(answered(benchmark, benchmark.examples(), ["jan  9", "1/8/93", "yesterday"]))
    assert {name: number.value for name, number in summary.numbers.items()} == pytest.approx(
        {"ANLS": (5 / 6 + 1) / 3, "ANLS, LLaVA's script": (4 / 5 + 1) / 3}
    )


def test_chartqa_by_halves(local: Callable[..., Benchmark]):
    benchmark = local("chartqa")
    summary = benchmark.summary(answered(benchmark, benchmark.examples(), ["14.7", "no", "57%"]))
    assert summary.main.value == pytest.approx(2 / 3)
    assert {name: number.value for name, number in summary.categories.items()} == {"human_test": 0.5, "augmented_test": 1.0}


def test_scienceqa_has_both_conventions(local: Callable[..., Benchmark]):
    benchmark = local("scienceqa")
    summary = benchmark.summary(answered(benchmark, benchmark.examples(), ["b", "The answer is A.", "C. c"]))
    assert {name: number.value for name, number in summary.numbers.items()} == pytest.approx(
        {"accuracy": 2 / 3, "accuracy, LLaVA's script": 2 / 3}
    )


def test_pope_pooled_and_by_category(local: Callable[..., Benchmark]):
    """random: 2 true, 1 false positive, 1 false negative: F1 4/6. popular: 1 true positive: 1. Pooled: 6/8.

    lmms-eval does not count 'nothing' for a no as a false positive, nor "Yes." as anything: 4/5.
    """
    rows = [pope(n, "random", answer) for n, answer in enumerate(["yes", "yes", "no", "yes"])] + [pope(0, "popular", "yes")]
    benchmark = local("pope", rows)
    summary = benchmark.summary(answered(benchmark, benchmark.examples(), ["yes", "Yes.", "nothing", "no", "Yes"]))
    values = {name: number.value for name, number in summary.numbers.items()}
    assert values == pytest.approx(
        {
            "F1, mean of categories": (4 / 6 + 1) / 2,
            "F1, pooled": 6 / 8,
            "F1, pooled, lmms-eval": 4 / 5,
            "accuracy": 3 / 5,
            "share of yes": 4 / 5,
        }
    )
    assert {name: number.value for name, number in summary.categories.items()} == pytest.approx(
        {"random": 4 / 6, "popular": 1}
    )
    assert summary.main.samples == 5


def test_mme_points(local: Callable[..., Benchmark]):
    """OCR: of two images one is right in both questions, one in one: accuracy 75, accuracy+ 50. code_reasoning: 50 and 0."""
    rows = [mme(f"{image}.png", f"{image}{turn}?", "Yes" if turn else "No") for image in "ab" for turn in (0, 1)]
    rows += [mme("c.png", f"{turn}?", "Yes" if turn else "No", "code_reasoning") for turn in (0, 1)]
    rows += [mme("d.png", "alone?", "Yes")]
    benchmark = local("mme", rows)
    said: list[str | None] = ["no", "Yes, it is", "No.", "not at all", None, "y", "yes"]
    summary = benchmark.summary(answered(benchmark, benchmark.examples(), said))
    assert {name: (number.value, number.maximum) for name, number in summary.numbers.items()} == {
        "perception + cognition": (175, 400),
        "perception": (125, 200),
        "cognition": (50, 200),
        "accuracy": (pytest.approx(5 / 7), 1),
    }
    assert {name: number.value for name, number in summary.categories.items()} == {"OCR": 125, "code_reasoning": 50}
    assert summary.numbers["perception"].low <= 125 <= summary.numbers["perception"].high
    assert summary.failed == 1


def test_mme_without_a_pair(local: Callable[..., Benchmark]):
    benchmark = local("mme")
    summary = benchmark.summary(answered(benchmark, benchmark.examples(1), ["yes"]))
    assert (summary.headline, summary.main.value) == ("accuracy", 1.0)


def test_mmbench_is_right_in_every_rotation_or_wrong(local: Callable[..., Benchmark]):
    benchmark = local("mmbench")
    examples = benchmark.examples()
    assert [one.id for one in examples] == ["7", "1000007", "9", "1000009", "2000009"]
    summary = benchmark.summary(answered(benchmark, examples, ["A", "the cat", "B.", "(A)", "B"]))
    assert {name: number.value for name, number in summary.numbers.items()} == {
        "accuracy, circular": 0.5,
        "accuracy, vanilla": 1.0,
    }
    assert summary.numbers["accuracy, circular"].samples == 2
    assert summary.categories["ocr"].value == 0.5


def test_mmbench_questions_that_a_limit_cut_off_are_not_counted(local: Callable[..., Benchmark]):
    benchmark = local("mmbench")
    summary = benchmark.summary(answered(benchmark, benchmark.examples(4), ["A", "B", "B", "A"]))
    assert (summary.main.value, summary.main.samples) == (1.0, 1)
    summary = benchmark.summary(answered(benchmark, benchmark.examples(1), ["A"]))
    assert (summary.headline, summary.main.value, summary.categories) == ("accuracy, vanilla", 1.0, {})


# ------------------------------------------------------------------ own data


def own(folder: Path, *rows: dict[str, Any], name: str = "data.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(png()["bytes"])
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


def test_own_folder(tmp_path: Path):
    rows = [
        {"image": "a.png", "question": "What?", "answers": ["red", "crimson"], "category": "colour"},
        {"image": "a.png", "question": "How many?", "answers": "3"},
    ]
    benchmark = benchmarks.find(str(own(tmp_path / "mine", *rows)))
    first, second = benchmark.examples()
    assert (first.id, first.category, first.question, first.answers) == ("0", "colour", "What?" + SHORT, ("red", "crimson"))
    assert (second.id, second.category, second.answers) == ("1", "", ("3",))
    assert first.image.size == (6, 4)
    summary = benchmark.summary(answered(benchmark, [first, second], ["Crimson.", "4"]))
    assert (summary.headline, summary.main.value, summary.categories["colour"].value) == ("exact match", 0.5, 1.0)
    assert benchmark.version.startswith("data.jsonl ")
    assert benchmarks.find("own", path=str(tmp_path / "mine")) == benchmark


def test_own_columns_metric_and_instruction(tmp_path: Path):
    folder = own(tmp_path, {"picture": "a.png", "q": "Is it red?", "label": "Yes ", "id": "x"})
    options = {"image": "picture", "question": "q", "answers": "label", "metric": "yes-no", "instruction": ""}
    benchmark = benchmarks.find(str(folder / "data.jsonl"), **options)
    (example,) = benchmark.examples()
    assert (example.id, example.question, example.answers) == ("x", "Is it red?", ("yes",))
    assert benchmark.score(example, "Yes, it is") == 1


@pytest.mark.parametrize("limit", [None, 2])
def test_own_parquet_with_bytes_or_paths(tmp_path: Path, limit: int | None):
    folder = own(tmp_path, name="notes.txt")
    columns = {"question": TEXT, "answers": List(TEXT)}
    rows = [{"image": png()["bytes"], "question": "What?", "answers": ["red"]}] * 2
    write(tmp_path / "bytes", {"image": Value("binary"), **columns}, rows, "train")
    write(folder, {"image": TEXT, **columns}, [row | {"image": "a.png"} for row in rows], "train")
    for path in (tmp_path / "bytes", folder):
        examples = benchmarks.find(str(path), metric="anls").examples(limit)
        assert [one.image.size for one in examples] == [(6, 4)] * 2


def test_a_single_answer_counts_as_that_of_ten_people(tmp_path: Path):
    benchmark = benchmarks.find(str(own(tmp_path, {"image": "a.png", "question": "?", "answers": "red"})), metric="vqa")
    (example,) = benchmark.examples()
    assert benchmark.score(example, "Red") == 1.0


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"question": "?", "answers": "a"}, {}, "line 1: no column 'image'; there are question, answers"),
        ({"image": "b.png", "question": "?", "answers": "a"}, {}, r"line 1: there is no image .*b\.png"),
        ({"image": "a.png", "question": "?", "answers": []}, {}, "column 'answers' must hold at least one text"),
        ({"image": "a.png", "question": "?", "answers": ["a", "b"]}, {"metric": "vqa"}, "one answer or 10"),
        ({"image": "a.png", "question": "?", "answers": "maybe"}, {"metric": "yes-no"}, "yes or no"),
    ],
)
def test_own_data_that_cannot_be_scored(tmp_path: Path, row: dict[str, Any], options: dict[str, str], message: str):
    with pytest.raises(DataError, match=message):
        benchmarks.find(str(own(tmp_path, row)), **options).examples()


def test_own_files_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"image": \n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: not JSON"):
        benchmarks.find(str(tmp_path / "a.jsonl")).examples()
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(DataError, match="there are no rows"):
        benchmarks.find(str(tmp_path / "b.jsonl")).examples()
    with pytest.raises(DataError, match=r"exactly one file.*a\.jsonl, b\.jsonl"):
        benchmarks.find(str(tmp_path)).examples()
    (tmp_path / "c.csv").write_text("image,question\n")
    with pytest.raises(DataError, match=r"\.jsonl or a \.parquet"):
        benchmarks.find(str(tmp_path / "c.csv")).examples()
    with pytest.raises(OptionError, match="unknown metric 'bleu'"):
        benchmarks.find(str(tmp_path), metric="bleu")

"""Whatever the documents and ``--help`` show to be typed is typed here.

Blocks of a page run one after the other, in one folder and one namespace, which knows a small ``model`` with its
``processor``, the ``inputs`` of one question, ``samples`` of it with its answer, a ``vit`` and a ``loader`` for it.
A comment above a block may say ``shown only: WHY`` (it needs a GPU, the hub, another project), or
``run smaller: OPTIONS``, which are put behind each of its commands, or ``run smaller: THIS -> THAT`` in Python.
Of ``make`` and ``pip install`` it is checked that what they name is there: running them here would be this test suite
itself.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification
from typer.testing import CliRunner

import vlprune
from vlprune import cli, shell
from vlprune.engine.patch import uninstall
from vlprune.evals import synthvqa, tinyvlm

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (shown only|run smaller): ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_TYPED = {
    "bench serve": "starts servers of vLLM, which is not installed here; tests/serving runs it",
    "demo": "serves until it is interrupted; its own tests start it",
    "calibrate": "reads a model of the hub; its own tests run it with one from the disk",
}
"""Commands whose examples are not run here, and why."""
APP = shell.application(cli.COMMANDS)


class Block(NamedTuple):
    language: str
    code: str
    smaller: str = ""


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are to be run."""
    found = []
    for mark, said, language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        if mark == "shown only":
            assert len(said) > 10, f"{page.name}: why is it shown only?"
        else:
            found.append(Block(language, code, said))
    return found


WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """What examples speak of without making it."""
    model, processor = tinyvlm.load()
    example = next(synthvqa.examples())
    content = [{"type": "image"}, {"type": "text", "text": example.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=example.image, text=prompt, return_tensors="pt")
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    vit = ViTForImageClassification(ViTConfig(**size, image_size=28, patch_size=7)).eval()
    known = {"model": model, "processor": processor, "inputs": inputs, "torch": torch, "vlprune": vlprune}
    answer = processor.tokenizer(example.answers[0], return_tensors="pt", add_special_tokens=False).input_ids[0]
    return {**known, "samples": [(inputs, answer)], "vit": vit, "loader": [torch.randn(2, 3, 28, 28)]}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the pictures of docs/ alone, and registries that forget what an example registers."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "images").symlink_to(ROOT / "docs" / "images")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlprune.method._methods", dict(vlprune.methods()) | vlprune.methods("vit"))
    vlprune.supported_models()
    from vlprune.engine import family

    monkeypatch.setattr(family, "_families", dict(family._families))
    return tmp_path


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_works(page: Path, small: dict[str, Any], place: Path):
    namespace = {**small, "__name__": "example"}
    try:
        for block in blocks(page):
            if block.language == "python":
                this, _, that = block.smaller.partition(" -> ")
                assert this in block.code, f"{page.name}: {this}"
                code = block.code.replace(this, that) if this else block.code
                exec(compile(code, f"{page.name}, a block", "exec", dont_inherit=True), namespace)
            elif block.language == "sh":
                for line in commands(block.code):
                    type_in(line, block.smaller)
            else:
                read(block)
    finally:
        uninstall(small["model"])
        uninstall(small["vit"])


def commands(code: str) -> list[str]:
    """The lines of a shell block, continued ones joined, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def type_in(line: str, smaller: str = "") -> None:
    """Runs a command line, or checks that what it names is there."""
    program, *words = shlex.split(line, comments=True)
    if program == "vlprune":
        result = CliRunner().invoke(APP, [*words, *shlex.split(smaller)], prog_name="vlprune")
        assert result.exit_code == 0, f"{line}\n{result.output}"
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
    elif [program, *words[:1]] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for names in re.findall(r"\[([\w,-]+)\]", line):
            assert set(names.split(",")) <= set(extras), line
    else:
        raise AssertionError(f"this test does not know how to run {line!r}; is it to be shown only?")


def read(block: Block) -> None:
    """Blocks that are no programs can be read as what they say they are."""
    if block.language == "toml":
        tomllib.loads(block.code)
    elif block.language == "json":
        json.loads(block.code)
    else:
        assert block.language in ("text", ""), f"a block of {block.language!r} is run by nothing"


def test_what_help_shows_works_as_typed(place: Path):
    """Each command has an example, and they work one after the other, in a folder with the pictures of docs/ alone."""
    for name, command in shell.every(cli.COMMANDS).items():
        (line,) = re.findall(r"^ *Example: (.*)$", command.help, flags=re.MULTILINE)
        assert line.startswith(f"vlprune {name}"), line
        if name not in NOT_TYPED:
            type_in(line)
    assert (place / "results" / "eval" / "table.md").exists()
    assert (place / "pages" / "results" / "speed.md").exists()

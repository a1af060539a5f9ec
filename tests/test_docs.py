"""The docs keep up with the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import vlprune
from tests import zoo
from vlprune import presets

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_built_in_method_has_a_page_that_names_its_options():
    import dataclasses

    for name, method in vlprune.methods().items():
        if method.__module__.startswith("vlprune."):
            page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
            for field in dataclasses.fields(method):
                assert field.name in page, f"{name}: {field.name}"


EXAMPLES = [page for page in PAGES if "@vlprune.register(" in page.read_text()]


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
def test_example_methods_work(page, monkeypatch):
    """Methods that a page defines run, and keep what their budget says, be it in front of the LLM, in it or in the cache."""
    monkeypatch.setattr("vlprune.method._methods", dict(vlprune.methods()))
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        if "@vlprune.register(" not in code:
            continue
        exec(compile(code, page.name, "exec", dont_inherit=True), {"__name__": "example"})
        name = re.findall(r'@vlprune.register\("(\w+)"\)', code)[0]
        model = zoo.build("llava_next")
        with vlprune.applied(model, name, budget=7):
            zoo.generate(model, zoo.prompt("llava_next"))
            report = vlprune.report(model)
        assert report.images[0].stages[-1].tokens_out == 7
        assert report.cached < report.total


def test_measured_tables_are_made_from_the_published_results(monkeypatch):
    """README and the page for choosing hold what docs/publish.py makes of the rows in docs/results; nobody edits them."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import publish

    results = {model: json.loads((publish.DOCS / page.summary).read_text()) for model, page in publish.PAGES.items()}
    calibrated = json.loads((publish.DOCS / publish.CALIBRATED).read_text())
    for page, name, made in (
        ("README.md", "readme", publish._overview(results)),
        ("docs/choosing.md", "choosing", publish._choosing(results)),
        ("docs/choosing.md", "presets", publish._presets(results)),
        ("docs/calibration.md", "calibrated", publish._calibrated(calibrated)),
    ):
        assert measured(page, name) == made, page


def measured(page: str, name: str) -> str:
    """What a page has between the marks of a measurement."""
    _, _, rest = (ROOT / page).read_text().partition(f"<!-- measured:{name} -->\n")
    return rest.partition(f"\n<!-- end of measured:{name} -->")[0]


def test_the_page_of_all_methods_is_made_from_its_results(monkeypatch):
    """And so are the tables of methods that were measured nowhere else."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import all_methods
    import publish

    results = all_methods.read()
    for name, made in all_methods.blocks(results).items():
        assert measured("docs/results/all-methods.md", name) == made, name
    published = [json.loads((publish.DOCS / page.summary).read_text()) for page in publish.PAGES.values()]
    elsewhere = {publish.name_of(row) for summary in published for row in publish.settings_of(summary)}
    names = {name for names in all_methods.parts(results).values() for name in names}
    for name in names - elsewhere:
        assert measured(f"docs/methods/{name}.md", name) == all_methods.method(name, results), name


def test_presets_are_as_good_as_any_method_that_was_measured_at_their_budget(monkeypatch):
    """docs/publish.py says which methods are: one of them has to stand in vlprune/presets.py."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import publish

    for kind in (presets.CLS, presets.PLAIN):
        summary = json.loads((publish.DOCS / publish.PAGES[presets.MEASURED_ON[kind]].summary).read_text())
        for name, preset in presets.PRESETS[kind].items():
            assert preset.method in publish.as_good(publish.settings_of(summary), preset), (kind, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_layers_of_architecture_exist():
    """Each file that docs/architecture.md names is there."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    for name in re.findall(r"`((?:engine/)?\w+\.py)`", text):
        found = [*(ROOT / "vlprune").rglob(name.rpartition("/")[2]), *(ROOT / "tests").rglob(name)]
        assert found, name

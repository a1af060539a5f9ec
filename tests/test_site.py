"""The site of docs/: built in strict mode, from what the code says."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import vlprune
from vlprune import listing
from vlprune.engine.vit.architecture import architectures

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Strict: a warning, such as a link that leads nowhere, ends the build with an error."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def text(page: Path) -> str:
    """What a reader sees of a page, in one line."""
    (body,) = re.findall(r"<article[^>]*>(.*)</article>", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_every_method_has_a_page_that_says_what_its_class_says(site: Path):
    overview = text(site / "methods" / "index.html")
    for name, cls in listing.all_methods().items():
        page, known = text(site / "methods" / f"{name}.html"), listing.described(name, cls)
        assert name in overview
        for stage in known["stages"]:
            assert f"( {stage} )" in page, name
        for option in known["options"]:
            assert option in page, f"{name}: {option}"
        assert "Reference" in page


def test_every_family_has_a_page(site: Path):
    pages = {page.stem: text(page) for page in (site / "families").glob("*.html")}
    families = [*vlprune.supported_models(), *architectures()]
    assert len(pages) == len(families) + 1
    for one in families:
        (page,) = (page for page in pages.values() if page.startswith(f"{one.name} ¶"))
        for model_type in one.model_types:
            assert model_type in page


def test_pages_ask_nothing_of_the_network(site: Path):
    """Neither fonts nor scripts: the site is whole on a machine without one."""
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)="?(https?:[^">\s]+)', page.read_text(encoding="utf-8")
        )
        assert loaded == [], page


def test_markup_of_docstrings_is_read(site: Path):
    """No role or directive of another markup is left for the reader."""
    for page in site.rglob("*.html"):
        assert not re.search(r":(?:class|func|meth|data|attr|mod):", text(page)), page

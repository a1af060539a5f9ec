"""Pages of the site that are made from the code when it is built, so that none goes stale.

README is the home page. Each method's page gets what its class says, each model family has a page of its own, and both have
an overview; `vlprune.listing` tells the same to the command line. Links to files outside of `docs` lead to their pages.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))

import pages

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"} | {
    "LICENSE": "licence.md"
}
"""Files of the root, and the pages that they are on the site."""


def on_config(config: Any) -> Any:
    for part in config.nav:
        if "Methods" in part:
            part["Methods"] += pages.method_nav()
        if "Models" in part:
            part["Models"] += pages.family_nav()
    return config


def on_files(files: Any, config: Any) -> Any:
    made = {**pages.made(), **{page: _of_root(name) for name, page in ELSEWHERE.items()}}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    markdown = pages.filled(markdown)
    depth = page.file.src_uri.count("/")
    for name, target in ELSEWHERE.items():
        markdown = markdown.replace(f"]({'../' * (depth + 1)}{name}", f"]({'../' * depth}{target}")
    found = re.fullmatch(r"methods/(.+)\.md", page.file.src_uri)
    return pages.method(found[1], markdown) if found and found[1] in pages.described() else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Cross-references of docstrings (``:class:`~vlprune.image.ImageTokens` ``) become the names that they name."""
    return re.sub(r":(?:class|func|meth|data|attr|mod):<code>~?(?:[\w.]+\.)?(\w+)</code>", r"<code>\1</code>", html)


def _of_root(name: str) -> str:
    """A file of the root as a page of the site, where `docs` is the root."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name == "LICENSE":
        return f"# Licence\n\n```text\n{text}\n```\n"
    text = re.sub(r"\]\(docs/", "](", text)
    for other, page in ELSEWHERE.items():
        text = text.replace(f"]({other}", f"]({page}")
    return f"---\nhide:\n  - navigation\n---\n{text}" if name == "README.md" else text

"""The launcher for VLMEvalKit, with a stand-in that has the parts of it that the launcher touches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parent.parent / "docs" / "vlmevalkit.py"
CONFIG = """
from functools import partial

class Wrapped:
    def __init__(self, path, use_vllm=False):
        from vlprune.evals import tinyvlm
        self.model, self.processor = tinyvlm.load(path)

supported_VLM = {"tiny": partial(Wrapped, path="tinyvlm")}
"""
DRIVER = """
import argparse
from vlmeval.config import supported_VLM

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--model", nargs="+")
    args = parser.parse_args()
    from vlprune.engine.patch import patch_of
    for name in args.model:
        patch = patch_of(supported_VLM[name](use_vllm=False).model)
        print(name, *args.data, patch and patch.method.to_dict())
"""


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, LAUNCHER, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(params=["clone", "package"])
def kit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """VLMEvalKit as a clone, its driver at the root, and as the package that has the driver inside."""
    package = tmp_path / "vlmeval"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "config.py").write_text(CONFIG)
    (tmp_path / "run.py" if request.param == "clone" else package / "run.py").write_text(DRIVER)
    return tmp_path


def test_each_setting_is_a_model_of_its_own(kit: Path):
    done = launch(kit, "--prune", "none,hired:0.2,fastv[layer=1]:0.5", "--data", "A", "B", "--model", "tiny")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "tiny A B None",
        "tiny+hired-0.2 A B {'method': 'hired', 'budget': 0.2, 'alpha': 0.5, 'allocation': 'counts'}",
        "tiny+fastv-layer=1-0.5 A B {'method': 'fastv', 'budget': 0.5, 'layer': 1, 'keep': None}",
    ]


def test_an_unknown_model_is_told(kit: Path):
    done = launch(kit, "--prune", "hired:0.2", "--data", "A", "--model", "small")
    assert done.returncode != 0
    assert "no model 'small'" in done.stderr


def test_a_method_without_a_budget_is_told(kit: Path):
    done = launch(kit, "--prune", "none,hired", "--data", "A", "--model", "tiny")
    assert done.returncode != 0
    assert "hired" in done.stderr

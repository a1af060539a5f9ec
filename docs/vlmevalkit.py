"""VLMEvalKit with pruned models, which has no plug-ins: its driver, after its table of models got pruned ones.

Usage, everything behind ``--prune`` as for VLMEvalKit's ``run.py``:

    python docs/vlmevalkit.py --prune none,hired:0.2:0.1 --data MMBench_DEV_EN --model llava_next_vicuna_7b
    torchrun --nproc-per-node=8 docs/vlmevalkit.py --prune ...

``--prune`` takes methods as ``vlprune eval --methods`` does: ``fastv[layer=3]:0.6:0.5`` is one method at two budgets.
Each of them with each model of ``--model`` becomes a model of its own, so that results lie in folders of their own, such
as ``llava_next_vicuna_7b+hired-0.2``; ``none`` is the model as it is. The model must be one that VLMEvalKit runs with
transformers, not with vLLM or LMDeploy.

Run in a clone of VLMEvalKit, or with a package of it installed that has the driver as ``vlmeval.run`` (ms-vlmeval).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prune", required=True, help="methods and budgets, as in none,hired:0.2:0.1")
    parser.add_argument("--model", required=True, nargs="+", help="names of VLMEvalKit's models")
    ours, theirs = parser.parse_known_args()
    driver = load_driver()
    names = add_models(driver.supported_VLM, ours.model, ours.prune)
    sys.argv[1:] = [*theirs, "--model", *names]
    load_env = getattr(driver, "load_env", None)
    if load_env is not None:
        load_env()
    driver.main()


def load_driver() -> ModuleType:
    """``run.py`` of the folder that this is started in, or of the installed package.

    It comes before torch and vlprune: it gives each process its GPUs by CUDA_VISIBLE_DEVICES while it is imported.
    """
    if (Path.cwd() / "run.py").is_file() and (Path.cwd() / "vlmeval").is_dir():
        sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module("run")
    return importlib.import_module("vlmeval.run")


def add_models(table: dict[str, Callable[..., Any]], models: Sequence[str], prune: str) -> list[str]:
    """Adds every model under every setting of ``prune`` to ``table``; their names."""
    from vlprune.evals.settings import UNPRUNED, parse, parts

    for text in parts(prune, ","):
        if text != UNPRUNED and len(parts(text, ":")) == 1:
            sys.exit(f"--prune {text}: a budget stands behind the method, as in {text}:0.2")
    names = []
    for model in models:
        if model not in table:
            sys.exit(f"VLMEvalKit has no model {model!r} in vlmeval/config.py")
        for setting in parse(prune, ""):
            if setting.method == UNPRUNED:
                names.append(model)
                continue
            # The name becomes the name of a folder.
            name = f"{model}+{re.sub(r'[^A-Za-z0-9._=]+', '-', setting.label)}"
            table[name] = functools.partial(build, table[model], setting.make())
            names.append(name)
    return names


def build(load: Callable[..., Any], method: Any, **options: Any) -> Any:
    """The model as VLMEvalKit loads it, pruned. ``options`` are what the driver adds, such as ``use_vllm``."""
    import vlprune

    built = load(**options)
    vlprune.apply(built.model, method)
    return built


if __name__ == "__main__":
    main()

"""Compiles kernels for GPUs that are not there: Triton's interpreter takes what its compiler does not.

Run as a program, in a process of its own, since Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 90)


def compiles(tmp_path: Path, operation: str, kernel: str, types: dict[str, str], **constants: Any) -> None:
    """Asserts that ``kernel`` of ``vlprune.kernels.<operation>.triton`` compiles.

    ``types``: of its arguments, ``*bf16`` or ``i32`` for example; every other argument is one of ``constants``.
    """
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    clean["TRITON_CACHE_DIR"] = str(tmp_path)
    given = json.dumps([operation, kernel, types, constants])
    run = subprocess.run([sys.executable, __file__, given], env=clean, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]


def main(operation: str, name: str, types: dict[str, str], constants: dict[str, Any]) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"vlprune.kernels.{operation}.triton"), name)
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn  # what decorators for tuning wrap
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    for capability in CAPABILITIES:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        triton.compile(source, target=GPUTarget("cuda", capability, 32))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))

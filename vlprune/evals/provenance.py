"""What a run is a measurement of: weights, versions, the machine, the state of the source tree."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import vlprune

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "pillow", "tokenizers")
"""What an answer or a time may depend on, beside vlprune itself; what is not installed is left out."""


def versions() -> dict[str, str]:
    found = {"vlprune": vlprune.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            # torch's own names its build, as in 2.13.0+cpu.
            found[package] = torch.__version__ if package == "torch" else version(package)
    return found


def model_identity(model: Any, name: str) -> dict[str, Any]:
    """Name, dtype, attention kernel, and what the weights are: the hub's revision, or a hash where there is none."""
    config = model.config
    revision = getattr(config, "_commit_hash", None)
    return {
        "name": name or type(model).__name__,
        "class": type(model).__name__,
        "revision": revision,
        "sha256": None if revision else weights_hash(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": getattr(config, "_attn_implementation", None),
    }


def weights_hash(model: Any) -> str:
    """SHA-256 over names, shapes and bytes of all weights and buffers in the state dict."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta":
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def joint_hash(fingerprints: Iterable[str]) -> str:
    """SHA-256 over fingerprints in their order."""
    digest = hashlib.sha256()
    for fingerprint in fingerprints:
        digest.update(fingerprint.encode())
    return digest.hexdigest()


def hardware(device: torch.device) -> dict[str, Any]:
    """Name of the processor that does the work, and for a CPU its cores and threads."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def git_commit() -> str | None:
    """The commit of the source tree that vlprune is imported from, with a "+" if the tree has changes; None elsewhere."""
    root = Path(vlprune.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        describe = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def today() -> str:
    """The date, UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")

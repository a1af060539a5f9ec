"""What is written behind the options of ``vlprune bench``, read and checked."""

from __future__ import annotations

from typing import Any

from vlprune.errors import VLPruneError


def parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def named(known: dict[str, Any], text: str | None, option: str) -> list[Any]:
    names = list(known) if text is None else parts(text)
    for name in names:
        if name not in known:
            raise VLPruneError(f"{option}: unknown {name!r}; known are {', '.join(known)}")
    return [known[name] for name in names]


def counts(text: str, option: str) -> list[int]:
    found = parts(text)
    for number in found or [text]:
        if not number.isdecimal() or int(number) < 1:
            raise VLPruneError(f"{option} {number!r}: allowed are whole numbers from 1, with commas between")
    return [int(number) for number in found]


def pixels(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, x, width = text.partition("x")
    if not (x and height.isdecimal() and width.isdecimal()):
        raise VLPruneError(f"--image {text!r}: allowed are height and width in pixels, as in 672x672")
    return int(height), int(width)


def device(name: str, threads: int | None = None) -> Any:
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    gpu = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if gpu else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise VLPruneError(f"--device {name!r}: allowed are auto, cpu, cuda")
    if name != "cpu" and not gpu:
        raise VLPruneError(f"--device {name!r}: PyTorch sees no GPU here")
    return torch.device(name)


def dtype(name: str, where: Any) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        name = "bfloat16" if where.type == "cuda" else "float32"
    if name not in known:
        raise VLPruneError(f"--dtype {name!r}: allowed are auto, {', '.join(known)}")
    return known[name]

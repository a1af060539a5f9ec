"""A server of vLLM for as long as it is needed, and the benchmark that comes with vLLM."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlprune.errors import VLPruneError

QUIET = {"VLLM_NO_USAGE_STATS": "1"}


class ServerError(VLPruneError):
    """A server did not start, or died."""


def command(model: str, *options: str) -> list[str]:
    """What starts a server."""
    # Not `vllm serve`: the command asks for the version of a package named vllm, and the build for the CPU has another name.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options]


@contextmanager
def server(model: str, options: Sequence[str], log: Path, seconds: float) -> Iterator[str]:
    """Address of an OpenAI-compatible server, once it answers. It writes to ``log``, and may take ``seconds`` to start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        running = subprocess.Popen(
            command(model, "--host", "127.0.0.1", "--port", str(port), *options),
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **QUIET},
        )
        try:
            _wait(address, running, log, seconds)
            yield address
        finally:
            running.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(60)
            running.kill()


def _wait(address: str, running: subprocess.Popen[Any], log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if running.poll() is not None:
            raise ServerError(f"the server did not start: {reason(log.read_text())}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise ServerError(f"the server did not answer within {seconds:.0f} seconds: {reason(log.read_text())}")


def reason(log: str) -> str:
    """Why a server stopped: what vlprune said, be it handed on by vLLM's configuration; else the first error, or the end."""
    ours = re.findall(r"(?<!\S)vlprune\.[\w.]+: (.*)$", log, flags=re.MULTILINE)
    handed_on = re.findall(r"^ *Value error, (.*?)(?: \[type=value_error.*)?$", log, flags=re.MULTILINE)
    others = re.findall(r"(?<!\S)[\w.]+(?:Error|Exception): .*$", log, flags=re.MULTILINE)
    return next(iter([*ours[-1:], *handed_on, *others]), log[-1000:])


def benchmark(address: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What ``vllm bench serve`` finds; ``options`` are its own, flags with None."""
    from vllm.benchmarks import serve  # pyright: ignore
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # pyright: ignore

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    words = [word for name, value in options.items() for word in (f"--{name}", value) if word is not None]
    with contextlib.redirect_stdout(io.StringIO()):
        return serve.main(parser.parse_args(["--base-url", address, *map(str, words)]))

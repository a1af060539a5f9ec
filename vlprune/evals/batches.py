"""Which samples are answered together, decided before anybody is asked to answer them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from vlprune.evals.benchmarks.base import Benchmark, Example


@dataclass(frozen=True)
class Task:
    """A benchmark and the examples of it that are asked, composed to batches.

    ``key`` names the benchmark in rows and files. ``max_new_tokens``: of an answer.
    """

    key: str
    benchmark: Benchmark
    examples: Sequence[Example]
    max_new_tokens: int
    batches: list[list[Example]] = field(repr=False)

    @classmethod
    def of(
        cls, key: str, benchmark: Benchmark, batch_size: int, limit: int | None = None, max_new_tokens: int | None = None
    ) -> Task:
        """Loads the examples, or the first ``limit`` of them."""
        examples = benchmark.examples(limit)
        tokens = max_new_tokens or benchmark.max_new_tokens
        return cls(key, benchmark, examples, tokens, make_batches(examples, batch_size))


def make_batches(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    """Always the same batches: examples with images of one size, and questions of like length, share one.

    So little is padded, and how many processes share the work makes no difference.
    """

    def likeness(example: Example) -> tuple[int, int, int]:
        return (*image_size(example), len(example.question))

    ordered = sorted(examples, key=likeness)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def image_size(example: Example) -> tuple[int, int]:
    """Width and height of the image, read off its header; 0 x 0 where it has none that can be read."""
    # Whatever is wrong with an image is recorded once its sample's turn comes.
    with contextlib.suppress(Exception):
        picture = example.picture() if callable(example.picture) else example.picture
        if isinstance(picture, Image.Image):
            return picture.size
        with Image.open(io.BytesIO(picture)) as opened:
            return opened.size
    return 0, 0


def of_each_size(examples: Sequence[Example], most: int = 8) -> list[Example]:
    """One example for each size of image; of more than ``most`` sizes as many, from the smallest to the largest."""
    sizes = {image_size(example): example for example in examples}
    sizes.pop((0, 0), None)
    ordered = [sizes[size] for size in sorted(sizes, key=lambda size: size[0] * size[1])]
    if len(ordered) <= most:
        return ordered
    return [ordered[round(place * (len(ordered) - 1) / (most - 1))] for place in range(most)]

"""TinyViT: a real ViT of 1.4 million parameters that names the largest shape of a SynthVQA scene, small enough to live in the
repository; what methods for vision transformers on their own are measured with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor
    from transformers import ViTForImageClassification

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Config, image processor's settings and float16 weights in the hub's file format; any ``from_pretrained`` reads it."""


def load_tinyvit() -> ViTForImageClassification:
    """The model in eval mode, float32, on the CPU."""
    import torch
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return model.eval()


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """What the model is given for RGB images of 112 x 112 pixels: ``(images, 3, 112, 112)`` from -1 to 1."""
    import numpy as np
    import torch

    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return stacked.float().div_(127.5).sub_(1.0)

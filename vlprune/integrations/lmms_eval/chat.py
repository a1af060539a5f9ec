"""lmms-eval's models for tasks that give messages, pruned."""

from lmms_eval.models.chat import llava_hf, qwen2_5_vl, qwen3_vl

from vlprune.integrations.lmms_eval.pruned import ONEVISION, Pruned


class Llava(Pruned, llava_hf.LlavaHf):
    """LLaVA 1.5 and LLaVA-NeXT in the format of transformers."""


class LlavaOnevision(Pruned, llava_hf.LlavaHf):
    """LLaVA-OneVision in the format of transformers; lmms-eval's ``llava_onevision`` runs the code of another repository."""

    pretrained_by_default = ONEVISION


class Qwen2_5_VL(Pruned, qwen2_5_vl.Qwen2_5_VL):
    """Qwen2.5-VL."""


class Qwen3_VL(Pruned, qwen3_vl.Qwen3_VL):
    """Qwen3-VL."""

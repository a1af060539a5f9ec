"""At the start of a server: reads the configuration, refuses what cannot be, and puts the pruned model in place."""

from __future__ import annotations

from functools import wraps
from typing import Any

from vlprune.errors import OptionError, UnsupportedModelError
from vlprune.integrations.vllm import ARCHITECTURES
from vlprune.integrations.vllm.settings import check, configured
from vlprune.integrations.vllm.tower import Tower
from vlprune.method import Method, from_dict

WATCHED = "watched_by_vlprune"
ASK_AGAIN = 1e-6
"""A rate of video pruning at which vLLM asks the model for positions again when images are encoded. No video is pruned."""


def watch_configurations() -> None:
    """From now on each server's configuration is completed here, once vLLM has completed it itself."""
    from vllm.config import VllmConfig  # pyright: ignore

    theirs = VllmConfig.try_verify_and_update_config
    if hasattr(theirs, WATCHED):
        return

    @wraps(theirs)
    def verify(self: Any) -> None:
        # Configurations of a model's parts are made of the completed one, and say so.
        fresh = not getattr(self.model_config, "config_updated", True)
        theirs(self)
        if fresh and getattr(self.model_config, "runner_type", "draft") != "draft":
            complete(self)

    setattr(verify, WATCHED, True)
    VllmConfig.try_verify_and_update_config = verify


def ask_again_on_cpu() -> None:
    """Has vLLM's runner for the CPU ask for positions again, too: its ``load_model`` leaves out what tells the GPU's to."""
    from vllm.platforms import current_platform  # pyright: ignore

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner  # pyright: ignore

    theirs = CPUModelRunner.load_model
    if hasattr(theirs, WATCHED):
        return

    @wraps(theirs)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        theirs(self, *args, **kwargs)
        if hasattr(self.get_model(), "pruner"):
            self.is_multimodal_pruning_enabled = True

    setattr(load_model, WATCHED, True)
    CPUModelRunner.load_model = load_model


def complete(vllm_config: Any) -> None:
    """Makes the model a pruned one if a method is configured. The method travels with the model's configuration."""
    method = configured(vllm_config.additional_config)
    if method is None:
        return
    model_config = vllm_config.model_config
    config = model_config.hf_config
    if model_config.architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{model_config.architecture} cannot be pruned in vLLM; supported are {', '.join(ARCHITECTURES)}. "
            "Leave out the key 'vlprune' of --additional-config, and VLPRUNE_VLLM"
        )
    tower = Tower(config)
    check(method, tower)
    _check_options(vllm_config, bool(method.wants(tower.shape)))
    config.architectures = [ARCHITECTURES[model_config.architecture]]
    config.vlprune = method.to_dict()
    if not tower.mrope:
        # vLLM keeps three positions a token for models that name sections; the model hands on the first.
        config.mrope_section = [1, 0, 0]
    model_config.multimodal_config.video_pruning_rate = ASK_AGAIN


def _check_options(vllm_config: Any, measures: bool) -> None:
    """Raises :class:`OptionError` for options of vLLM that do not go with pruning."""
    images = vllm_config.model_config.multimodal_config
    ranks = vllm_config.parallel_config.tensor_parallel_size
    apart = ranks > 1 and images.mm_encoder_tp_mode == "data"
    compilation = vllm_config.compilation_config
    compiled = measures and compilation.compile_mm_encoder
    refused = {
        "--enable-mm-embeds: features from outside come without what methods go by": images.enable_mm_embeds,
        "--video-pruning-rate: with vlprune a server takes images alone": images.video_pruning_rate,
        "speculative decoding: the draft model would be given other positions": vllm_config.speculative_config,
        "--mm-encoder-tp-mode data: a rank's encoder does not see all images": apart,
        "a compiled vision encoder (compile_mm_encoder): it cannot be watched": compiled,
        "CUDA graphs of the vision encoder (cudagraph_mm_encoder): they leave out the step that prunes": (
            compilation.cudagraph_mm_encoder
        ),
    }
    for reason, given in refused.items():
        if given:
            raise OptionError(f"vlprune cannot be used with {reason}")


def method_of(config: Any) -> Method:
    """The method that :func:`complete` noted in a model's configuration."""
    return from_dict(config.vlprune)

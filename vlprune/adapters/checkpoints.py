"""What checkpoints of LLaVA's own code call the tensors of a projector."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vlprune.errors import OptionError

PREFIX = "mm_projector."


def projector_tensors(tensors: Mapping[str, Tensor], wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """Those of ``tensors`` that belong to the projector, without what stands before their names in the checkpoint.

    Raises :class:`OptionError` if one of ``wanted`` is not among them.
    """
    own = {name.rpartition(PREFIX)[2]: tensor for name, tensor in tensors.items() if PREFIX in name or name in wanted}
    missing = [name for name in wanted if name not in own]
    if missing:
        raise OptionError(f"the checkpoint has no {', '.join(PREFIX + name for name in missing)}: it is of another projector")
    return own

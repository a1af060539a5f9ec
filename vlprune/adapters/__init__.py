"""Projectors that were trained to give few visual tokens, from their checkpoints.

>>> model.model.multi_modal_projector = MatryoshkaQueries.from_checkpoint(tensors, count=16)
"""

from vlprune.adapters.matryoshka import MatryoshkaQueries
from vlprune.adapters.quecc import QueCC, question_vector

__all__ = ["MatryoshkaQueries", "QueCC", "question_vector"]

"""Errors: each says what was given, what is allowed and what to do."""


class VLPruneError(Exception):
    """Base of all errors that vlprune raises on purpose."""


class UnsupportedModelError(VLPruneError):
    """The model's family, or a trait of this model, is not supported."""


class UnsupportedMethodError(VLPruneError):
    """The method is unknown, or needs something that this model does not have."""


class OptionError(VLPruneError, TypeError):
    """A method was given an option that it does not have."""


class BudgetError(VLPruneError, ValueError):
    """A budget that is neither a positive count nor a fraction in (0, 1], or a selection that misses its budget."""


class NotAppliedError(VLPruneError):
    """The model is not patched, or has not seen an image since it was."""


class IncompatibleCacheError(VLPruneError):
    """A cache that cannot hold a pruned sequence."""

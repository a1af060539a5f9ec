"""What ``vlprune bench vit`` measures by default; apart, so that the command line need not import PyTorch for it."""

MODELS = "vit-b/16,vit-l/14-336"
METHODS, BUDGETS = "tome,pitome", "0.75,0.5,0.25"
"""A quarter, a half and three quarters fewer token-layers."""

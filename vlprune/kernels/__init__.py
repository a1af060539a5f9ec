"""Kernels for the hot path, each beside a PyTorch reference. Empty so far: the engine runs on plain PyTorch."""

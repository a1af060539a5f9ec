"""Interactive demos. Empty so far."""

"""Checkpoint folders: which tensors they hold, and where their bytes lie."""

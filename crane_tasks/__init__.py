"""The CRANE method: one file per stage, over `numerics` and `models`."""

"""A model walked with one decoder layer in memory at a time."""

"""All knowledge of checkpoints and of the models in them."""

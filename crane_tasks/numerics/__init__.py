"""The formulas of the method: tensors in, tensors out."""

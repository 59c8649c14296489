"""Calibration and held-out sets: rows, their tokens, and who continues them."""

"""TIES (arXiv 2306.01708) with one donor: θ = θ_base + α T(δ), T the largest `merge.density`.

Its election of signs has one voter, so it is trivial: every kept entry has the elected sign."""

from crane_tasks.edit import Edit
from crane_tasks.known_parts import TOP

EDIT = Edit(
    title="TIES with one donor",
    formula="theta = theta_base + alpha * top(donor - base)",
    cite="arXiv 2306.01708",
    threshold=TOP,
)

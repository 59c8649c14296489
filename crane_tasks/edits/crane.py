"""CRANE (arXiv 2605.14084): θ = θ_base + P_τ( α · S(c, l) · T(δ) )."""

from crane_tasks.edit import Edit
from crane_tasks.known_parts import MEDIAN, TAYLOR
from crane_tasks.projections import SIGMOID

EDIT = Edit(
    title="CRANE",
    formula="theta = theta_base + P_tau( alpha * S(component, layer) * T(donor - base) )",
    cite="arXiv 2605.14084",
    threshold=MEDIAN,
    gate=TAYLOR,
    projection=SIGMOID,
)

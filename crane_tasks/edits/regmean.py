"""RegMean (arXiv 2212.09849) for a pair: θ = θ_base + α δ C_R (C_R + μ C_A)⁻¹."""

from crane_tasks.edit import Edit
from crane_tasks.projections import REGRESSION

EDIT = Edit(
    title="RegMean of a pair",
    formula="theta = theta_base + alpha * (donor - base) @ C_R @ inverse(C_R + protect * C_A)",
    cite="after arXiv 2212.09849",
    projection=REGRESSION,
)

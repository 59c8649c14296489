"""AIM (arXiv 2502.02421) over plain interpolation: θ = θ_base + α δ (1 - s (1 - ω))."""

from crane_tasks.edit import Edit
from crane_tasks.projections import AIM

EDIT = Edit(
    title="AIM",
    formula="theta = theta_base + alpha * (donor - base) * (1 - s * (1 - omega))",
    cite="arXiv 2502.02421",
    projection=AIM,
)

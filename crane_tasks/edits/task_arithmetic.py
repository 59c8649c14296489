"""Task arithmetic (arXiv 2212.04089): θ = θ_base + α τ, with the one task vector τ = δ."""

from crane_tasks.edit import Edit

EDIT = Edit(
    title="task arithmetic",
    formula="theta = theta_base + alpha * (donor - base)",
    cite="arXiv 2212.04089",
)

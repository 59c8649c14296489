"""Plain interpolation (arXiv 2510.10977): θ = θ_base + α δ."""

from crane_tasks.edit import Edit

EDIT = Edit(
    title="linear interpolation",
    formula="theta = theta_base + alpha * (donor - base)",
    cite="arXiv 2510.10977",
)

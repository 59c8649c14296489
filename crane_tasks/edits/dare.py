"""DARE (arXiv 2311.03099): θ = θ_base + α m δ / density, m drawn by `merge.seed`."""

from crane_tasks.edit import Edit
from crane_tasks.known_parts import DROP

EDIT = Edit(
    title="DARE",
    formula="theta = theta_base + alpha * mask * (donor - base) / density",
    cite="arXiv 2311.03099",
    threshold=DROP,
)

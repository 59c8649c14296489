"""CRANE coordinate by coordinate: T keeps what both sets' losses fall along."""

from crane_tasks.edit import Edit
from crane_tasks.known_parts import AGREED, TAYLOR
from crane_tasks.projections import SIGMOID

EDIT = Edit(
    title="elementwise gate",
    formula="theta = theta_base + P_tau( alpha * S(component, layer) * agreed(donor - base) )",
    cite="after arXiv 2605.14084",
    threshold=AGREED,
    gate=TAYLOR,
    projection=SIGMOID,
)

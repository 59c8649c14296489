"""Slerp: each tensor on the sphere from base to donor, by α of the angle between them."""

from crane_tasks.edit import Edit

EDIT = Edit(
    title="spherical interpolation",
    formula="theta = slerp(theta_base, theta_donor, alpha), tensor by tensor",
    cite="Shoemake 1985",
    spherical=True,
)

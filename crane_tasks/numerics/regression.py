"""P by regression: the closed form of RegMean (arXiv 2212.09849) for a pair (docs/method.md).

P(D) = D C_R (C_R + μ C_A)⁻¹ = argmin over E of  E_R |(D - E) x|² + μ E_A |E x|²

C_R and C_A are the second moments E[x xᵀ] of a weight's inputs x over the tokens of the
reasoning and the agent set. C_R = λ I makes it a ridge regression, C_R ∝ C_A a plain factor.
"""

import torch
from jaxtyping import Float
from torch import Tensor

# Of the mean eigenvalue, added to both: where neither set has been, P is the plain factor.
SHRINKAGE = 1e-3


def regression(
    reasoning: Float[Tensor, "d d"], agent: Float[Tensor, "d d"], protect: float
) -> Float[Tensor, "d d"] | None:
    """The matrix M of P(D) = D M, float64, from C_R, C_A and μ > 0; None without any moments.

    In float64: C spans many orders of magnitude, and M has eigenvalues in [0, 1] all the same.
    """
    r, a = reasoning.double(), agent.double()
    level = SHRINKAGE * float(r.trace() + a.trace()) / (2 * r.shape[0])
    if level == 0:
        return None
    ridge = level * torch.eye(r.shape[0], dtype=r.dtype, device=r.device)
    lower = torch.linalg.cholesky(r + protect * a + (1 + protect) * ridge)
    return torch.cholesky_solve(r + ridge, lower).T


def plain_share(protect: float) -> float:
    """1 / (1 + μ): what P leaves where both sets' inputs are alike, and where none are known."""
    return 1.0 / (1.0 + protect)


def relaxed(
    update: Float[Tensor, "*batch d"], magnitude: Float[Tensor, " d"], omega: float
) -> Float[Tensor, "*batch d"]:
    """AIM (arXiv 2502.02421): D (1 - s (1 - ω)) by input channel, s = E|x| over its maximum."""
    strongest = magnitude.max()
    share = magnitude / strongest if float(strongest) > 0 else magnitude
    return update * (1 - share * (1 - omega)).to(update.dtype)

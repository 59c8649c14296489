"""P_τ, the Graduated Sigmoidal Projection (docs/method.md, "P").

H = U diag(σ) Vᵀ,   w_i = sigmoid(k (σ_i / σ_1 - τ)),  k = 4.6 / τ
P(D) = D - (D V) diag(w) Vᵀ
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# k τ: a direction with σ = 0 keeps sigmoid(-4.6) = 0.01 of its protection.
STEEPNESS = 4.6


@dataclass(frozen=True)
class Basis:
    """The format directions at one site.

    Attributes:
        directions: V, orthonormal columns, float32 [d, r], strongest first.
        sigma: singular values of H, float64 [r], descending.
        rows: number of activation rows in H.
    """

    directions: Float[Tensor, "d r"]
    sigma: Float[Tensor, " r"]
    rows: int


def gram(rows: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """HᵀH of some rows in float64: additive over rows, so memory is independent of n."""
    wide = rows.double()
    return wide.T @ wide


def basis_from_gram(total: Float[Tensor, "d d"], rows: int, *, rank: int, cutoff: float) -> Basis:
    """V and σ of H from HᵀH = V diag(σ²) Vᵀ; keeps r ≤ rank and σ_i > cutoff · σ_1.

    In float64 the smallest kept eigenvalue (cutoff² = 1e-10 of the largest) stands well
    above rounding, so this agrees with the exact SVD of H; unlike a randomised one it is
    deterministic. No rows, or only zero rows, give an empty basis.
    """
    values, vectors = torch.linalg.eigh(total)
    sigma = values.flip(0).clamp_min(0).sqrt()
    keep = int((sigma > cutoff * sigma[0]).sum()) if float(sigma[0]) > 0 else 0
    keep = min(keep, rank, rows)
    directions = vectors.flip(1)[:, :keep].float().contiguous()
    return Basis(directions=directions, sigma=sigma[:keep].clone(), rows=rows)


def protection(sigma: Float[Tensor, " r"], tau: float) -> Float[Tensor, " r"]:
    """w_i = sigmoid(k (σ_i / σ_1 - τ)) with k = 4.6 / τ; dtype of `sigma`. Needs τ > 0."""
    if not tau > 0:
        raise ValueError(f"tau must be positive, not {tau}")
    if sigma.numel() == 0:
        return sigma
    return torch.sigmoid(STEEPNESS / tau * (sigma / sigma[0] - tau))


def hard_protection(sigma: Float[Tensor, " r"], tau: float) -> Float[Tensor, " r"]:
    """w_i = 1 where σ_i / σ_1 >= τ, else 0: the null space of what is left; dtype of `sigma`."""
    return (sigma >= tau * sigma[0]).to(sigma.dtype) if sigma.numel() else sigma


def ridge_protection(sigma: Float[Tensor, " r"], tau: float) -> Float[Tensor, " r"]:
    """w_i = σ_i² / (σ_i² + λ) with λ = (τ σ_1)²: one half where σ_i / σ_1 = τ.

    The projection of least squares with a ridge: P(D) = D (I - HᵀH (HᵀH + λ I)⁻¹).
    """
    squares = sigma.square()
    return squares / (squares + (tau * sigma[0]) ** 2) if sigma.numel() else sigma


def project(
    update: Float[Tensor, "*batch d"],
    directions: Float[Tensor, "d r"],
    weight: Float[Tensor, " r"],
) -> Float[Tensor, "*batch d"]:
    """P(D) = D - (D V) diag(w) Vᵀ: acts on the input side, the last axis of `update`."""
    along = update @ directions * weight
    if update.dim() == 2:
        return torch.addmm(update, along, directions.T, alpha=-1)
    return update - along @ directions.T

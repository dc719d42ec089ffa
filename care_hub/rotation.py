"""Rotations of the embedding space: fit one, apply it, compose it.

The orthogonal Procrustes problem, known as Wahba's problem for proper rotations.
"""

import torch
from torch import Tensor


def procrustes(z: Tensor, z_t: Tensor, special: bool = False) -> Tensor:
    """The orthogonal R (d, d) that minimises sum_i |z_t_i - R z_i|^2.

    `z`, `z_t`: (N, d), or (..., N, d) for many problems at once; computed in float64. `special=True` restricts to
    rotations proper (det R = +1) by turning the weakest singular direction.
    Source: Schoenemann 1966; Wahba 1965: B = sum z_t_i z_i^T = U S V^T, R = U V^T.
    """
    cross = z_t.double().transpose(-2, -1) @ z.double()
    u, _, vh = torch.linalg.svd(cross)
    if special:
        sign = torch.linalg.det(u @ vh).sign()
        u = torch.cat([u[..., :-1], u[..., -1:] * sign[..., None, None]], dim=-1)
    return u @ vh

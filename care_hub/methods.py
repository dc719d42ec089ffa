"""Views -> losses: SimCLR, and CARE on top of it. Every loss is that of the global batch, the same on every process."""

import torch
from torch import Tensor, nn

from . import losses
from .distributed import gather


class SimCLR(nn.Module):
    """InfoNCE between two views drawn per image, plus `weight` times equivariance between two views drawn per group.

    `weight` 0 is plain SimCLR (Chen et al. 2020); otherwise CARE: L = L_InfoNCE + weight * L_equi (Gupta et al. 2024).
    The two pairs go through the encoder one after the other, so the batch statistics behind InfoNCE are the same with
    and without equivariance.
    """

    def __init__(self, encoder: nn.Module, temperature: float, weight: float, groups: int, subtype: str = "infonce"):
        super().__init__()
        self.encoder = encoder
        self.temperature, self.weight, self.groups, self.subtype = temperature, weight, groups, subtype

    def forward(self, views: Tensor, group_views: Tensor | None = None) -> dict[str, Tensor]:
        """`views`: (2b, 3, S, S), first view then second; `group_views` the same for the pair drawn per group, None if
        `views` themselves were drawn per group or `weight` is 0. Returns the scalars loss, infonce, equivariance."""
        z1, z2 = self._embed(views)
        contrastive = losses.contrastive(z1, z2, self.temperature, self.subtype)
        equivariance = contrastive.new_zeros(())
        if self.weight:
            if group_views is not None:
                z1, z2 = self._embed(group_views)
            equivariance = losses.equivariance(z1, z2, self.groups)
        return {"loss": contrastive + self.weight * equivariance, "infonce": contrastive, "equivariance": equivariance}

    def _embed(self, views: Tensor) -> list[Tensor]:
        return [gather(z) for z in self.encoder(views).chunk(2)]

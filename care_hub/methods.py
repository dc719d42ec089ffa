"""Views -> losses: SimCLR and MoCo-v2, and CARE on top of either.

Every loss is that of the global batch, the same on every process.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses
from .distributed import gather


class SimCLR(nn.Module):
    """InfoNCE between two views drawn per image, plus `weight` times equivariance between two views drawn per group.

    `weight` 0 is plain SimCLR (Chen et al. 2020); otherwise CARE: L = L_InfoNCE + weight * L_equi (Gupta et al. 2024).
    The two pairs go through the encoder one after the other, so the batch statistics behind InfoNCE are the same with
    and without equivariance. Where one pair serves both losses, every `stride`-th image of it was drawn per group.
    """

    def __init__(self, encoder: nn.Module, temperature: float, weight: float, groups: int, stride: int = 1, subtype: str = "infonce"):
        super().__init__()
        self.encoder = encoder
        self.temperature, self.weight, self.groups, self.stride, self.subtype = temperature, weight, groups, stride, subtype

    def forward(self, views: Tensor, group_views: Tensor | None = None) -> dict[str, Tensor]:
        """`views`: (2b, 3, S, S), first view then second; `group_views` the same for the pair drawn per group, None if
        `views` themselves were drawn per group or `weight` is 0. Returns the scalars loss, infonce, equivariance."""
        contrastive, pair = self.contrastive(views)
        equivariance = contrastive.new_zeros(())
        if self.weight:
            if group_views is not None:
                pair = self.embed(group_views)
            else:
                part = slice(None, None, self.stride)
                pair = [z[part] for z in pair] if pair else self.embed(torch.cat([v[part] for v in views.chunk(2)]))
            equivariance = losses.equivariance(*pair, self.groups)
        return {"loss": contrastive + self.weight * equivariance, "infonce": contrastive, "equivariance": equivariance}

    def contrastive(self, views: Tensor) -> tuple[Tensor, list[Tensor] | None]:
        """The contrastive loss, and the two embeddings of the global batch where it has them."""
        pair = self.embed(views)
        return losses.contrastive(*pair, self.temperature, self.subtype), pair

    def embed(self, views: Tensor) -> list[Tensor]:
        """(2b, ...) of this process -> two (B, d) of all."""
        return [gather(z) for z in self.encoder(views).chunk(2)]

    def after_step(self) -> None:
        """Called once after every optimiser step."""


class MoCo(SimCLR):
    """MoCo-v2 (He et al. 2020; Chen et al. 2020b): queries against their keys and a queue of older keys.

    Keys come from a momentum copy of the encoder and enter the queue after they were scored. The equivariance loss is
    taken on the query encoder.
    """

    def __init__(
        self, encoder: nn.Module, temperature: float, weight: float, groups: int, stride: int, queue_size: int, momentum: float
    ):  # fmt: skip
        super().__init__(encoder, temperature, weight, groups, stride)
        self.momentum = momentum
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        dim = encoder.care["projection"]["outputs"]
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    def contrastive(self, views: Tensor) -> tuple[Tensor, None]:
        first, second = views.chunk(2)
        queries = gather(self.encoder(first))
        with torch.no_grad():
            keys = gather(self.key_encoder(second)).to(self.queue.dtype)
        loss = losses.moco(queries, keys, self.queue.clone(), self.temperature)
        where = (self.place + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[where] = keys
        self.place.copy_((self.place + len(keys)) % len(self.queue))
        return loss, None

    @torch.no_grad()
    def after_step(self) -> None:
        pairs = zip(self.key_encoder.parameters(), self.encoder.parameters(), strict=True)
        for key, query in pairs:
            key.lerp_(query, 1 - self.momentum)

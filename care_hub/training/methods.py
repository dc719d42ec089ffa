"""Views -> losses: SimCLR and MoCo-v2, and CARE on top of either.

Every loss is that of the global batch, the same on every process.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..distributed import gather
from ..encoder import Encoder


class SimCLR(nn.Module):
    """InfoNCE between two views sampled per image, plus `weight` times equivariance between two
    sampled per group.

    `weight` 0 is plain SimCLR (Chen et al. 2020); otherwise CARE: L = L_InfoNCE + weight * L_equi
    (Gupta et al. 2024). The two pairs go through the encoder one after the other, so the batch
    statistics behind InfoNCE are the same with and without equivariance. Where one pair serves both
    losses, every `stride`-th image of it was sampled per group.

    An encoder with a contrastive head steers: InfoNCE is taken there, and may ignore the
    augmentation. L = L_InfoNCE + weight * (L_equi + u * L_uniformity), with the last two on the
    projection head; the last keeps the views of an image apart. `spread`: u and its temperature.
    """

    def __init__(
        self,
        encoder: Encoder,
        temperature: float,
        weight: float,
        groups: int,
        stride: int = 1,
        subtype: str = "infonce",
        spread: tuple[float, float] = (0.33, 0.2),
    ):
        super().__init__()
        self.encoder = encoder
        self.temperature, self.weight, self.groups = temperature, weight, groups
        self.stride, self.subtype, self.spread = stride, subtype, spread

    def forward(self, views: Tensor, group_views: Tensor | None = None) -> dict[str, Tensor]:
        """The scalars loss, infonce, equivariance and, with a contrastive head, uniformity.

        `views`: (2b, 3, S, S), first view then second. `group_views`: the same for the pair sampled
        per group; None if `views` themselves were sampled per group, or `weight` is 0.
        """
        contrastive, pair = self.contrastive(views)
        zero = contrastive.new_zeros(())
        found = {"loss": contrastive, "infonce": contrastive, "equivariance": zero}
        if self.steers:
            found["uniformity"] = zero
        if self.weight:
            if group_views is not None:
                pair = self.embed(group_views)
            elif pair is None:
                pair = self.embed(torch.cat([view[:: self.stride] for view in views.chunk(2)]))
            else:
                pair = [z[:: self.stride] for z in pair]
            found["equivariance"] = steering = losses.equivariance(pair[0], pair[1], self.groups)
            if self.steers:
                share, temperature = self.spread
                found["uniformity"] = losses.uniformity(pair[0], pair[1], temperature, own_view=True)
                steering = steering + share * found["uniformity"]
            found["loss"] = contrastive + self.weight * steering
        elif self.steers:  # as yet without a gradient, for which many processes would wait
            unused = [p.sum() for k, p in self.encoder.named_parameters() if k.startswith("projection.")]
            found["loss"] = contrastive + 0 * torch.stack(unused).sum()
        return found

    @property
    def steers(self) -> bool:
        """Whether InfoNCE has a head of its own."""
        return self.encoder.contrastive_head is not None

    def contrastive(self, views: Tensor) -> tuple[Tensor, Sequence[Tensor] | None]:
        """The contrastive loss, and the two projections of the global batch where it has them."""
        first, second = self.embed(views, contrastive=True)
        loss = losses.contrastive(first, second, self.temperature, self.subtype)
        return loss, None if self.steers else (first, second)

    def embed(self, views: Tensor, contrastive: bool = False) -> Sequence[Tensor]:
        """(2b, ...) of this process -> two (B, d) of all processes, as `Encoder.forward` gives them."""
        return [gather(z) for z in self.encoder(views, contrastive).chunk(2)]

    def after_step(self) -> None:
        """Called once after every optimizer step."""


class Steering(SimCLR):
    """The steering head alone: over a frozen backbone InfoNCE would train a head that embeds nothing."""

    def forward(self, views: Tensor, group_views: Tensor | None = None) -> dict[str, Tensor]:
        """As `SimCLR.forward`; `views` are those sampled per group, and there are no others."""
        first, second = self.embed(views)
        (share, temperature), none = self.spread, views.new_zeros(())
        equivariance = losses.equivariance(first, second, self.groups)
        uniformity = losses.uniformity(first, second, temperature, own_view=True)
        loss = self.weight * (equivariance + share * uniformity)
        return {"loss": loss, "infonce": none, "equivariance": equivariance, "uniformity": uniformity}


class MoCo(SimCLR):
    """MoCo-v2 (He et al. 2020; Chen et al. 2020b): queries against their keys and older ones in a queue.

    Keys come from a momentum copy of the encoder and enter the queue after they were scored. The
    equivariance loss is taken on the query encoder.
    """

    queue: Tensor  # (K, d) unit vectors
    place: Tensor  # where the next keys go

    def __init__(
        self,
        encoder: Encoder,
        temperature: float,
        weight: float,
        groups: int,
        stride: int,
        queue_size: int,
        momentum: float,
        dim: int,
        spread: tuple[float, float] = (0.33, 0.2),
    ):
        super().__init__(encoder, temperature, weight, groups, stride, spread=spread)
        self.momentum = momentum
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    def contrastive(self, views: Tensor) -> tuple[Tensor, None]:
        """InfoNCE of queries against keys and queue; there is no pair of embeddings with gradients."""
        first, second = views.chunk(2)
        queries = gather(self.encoder(first, contrastive=True))
        with torch.no_grad():
            keys = gather(self.key_encoder(second, contrastive=True)).to(self.queue.dtype)
        loss = losses.moco(queries, keys, self.queue.clone(), self.temperature)
        where = (self.place + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[where] = keys
        self.place.copy_((self.place + len(keys)) % len(self.queue))
        return loss, None

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the key encoder a little toward the query encoder."""
        for key, query in zip(self.key_encoder.parameters(), self.encoder.parameters(), strict=True):
            if query.requires_grad:  # the others, of a frozen backbone, are the same
                key.lerp_(query, 1 - self.momentum)

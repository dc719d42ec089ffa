"""The losses of CARE as pure functions of embeddings.

Shapes: `z1`, `z2` are (B, d), row i of both is the same image under two augmentations, every row has unit length.
All of them return a scalar. Under autocast they compute in float32, since exp(1 / 0.07) does not fit float16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CareHubError

SUBTYPES = ("infonce", "alignment", "uniformity", "none")


def _full(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def _similarities(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """(2B, 2B) logits between all views; an anchor is never compared with itself."""
    z = torch.cat([_full(z1), _full(z2)])
    with torch.autocast(z.device.type, enabled=False):
        logits = z @ z.T / temperature
    return logits.fill_diagonal_(float("-inf"))


def _positives(batch: int, device) -> Tensor:
    return torch.arange(2 * batch, device=device).roll(batch)


def info_nce(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """InfoNCE (NT-Xent) of SimCLR: mean over the 2B anchors of -log(e^{s+/t} / sum_{k != i} e^{s_k/t}).

    Source: van den Oord et al. 2018, eq. 4; Chen et al. 2020, eq. 1. Written as a cross-entropy, which can't overflow.
    """
    return F.cross_entropy(_similarities(z1, z2, temperature), _positives(len(z1), z1.device))


def alignment(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """The part of InfoNCE that pulls views together: mean(-s+ / t)."""
    return -(_full(z1) * _full(z2)).sum(dim=1).mean() / temperature


def uniformity(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """The part of InfoNCE that spreads images: mean over anchors of log sum_{negatives} e^{s/t} (2B - 2 negatives)."""
    logits = _similarities(z1, z2, temperature)
    positives = _positives(len(z1), z1.device)
    return logits.scatter(1, positives[:, None], float("-inf")).logsumexp(dim=1).mean()


def contrastive(z1: Tensor, z2: Tensor, temperature: float, subtype: str = "infonce") -> Tensor:
    """InfoNCE or one of its parts; `none` is zero (equivariance alone)."""
    if subtype == "none":
        return z1.new_zeros(())
    if subtype not in SUBTYPES:
        raise CareHubError(f"there is no loss subtype '{subtype}'; choose from {', '.join(SUBTYPES)}.")
    return {"infonce": info_nce, "alignment": alignment, "uniformity": uniformity}[subtype](z1, z2, temperature)


def equivariance(z1: Tensor, z2: Tensor, groups: int) -> Tensor:
    """Orthogonal equivariance: the Gram matrices of a group must survive its change of augmentation.

    Rows are `groups` consecutive groups of m = B / groups images; within a group all rows of `z1` share one
    augmentation and all rows of `z2` another. Per group: mean over rows i of 2 sum_{j != i} (z1_i.z1_j - z2_i.z2_j)^2,
    then the mean over groups. It grows with m, so its weight and the number of groups belong together.

    Source: Gupta et al. 2024, eq. 3 (population form) and their code (constants). No mask is needed: the rows have
    unit length, so both diagonals are 1. Raises CareHubError when B does not divide into groups of two or more.
    """
    batch, dim = z1.shape
    if groups < 1 or batch % groups or batch // groups < 2:
        raise CareHubError(
            f"{batch} images can't be cut into {groups} equal groups of at least 2 for the equivariance loss; "
            "choose --equiv-splits so that it divides the batch."
        )
    size = batch // groups
    with torch.autocast(z1.device.type, enabled=False):
        a, b = (_full(z).reshape(groups, size, dim) for z in (z1, z2))
        difference = torch.bmm(a, a.transpose(1, 2)) - torch.bmm(b, b.transpose(1, 2))
        return 2 * difference.square().sum() / batch


def moco(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE of MoCo: each query against its own key and K older keys; `queue` is (K, d), keys carry no gradient.

    Source: He et al. 2020, eq. 1.
    """
    queries, keys, queue = _full(queries), _full(keys.detach()), _full(queue)
    with torch.autocast(queries.device.type, enabled=False):
        positive = (queries * keys).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, queries @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))

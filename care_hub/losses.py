"""The losses of CARE as pure functions of embeddings: L = InfoNCE + λ · orthogonal equivariance.

Shapes: `z1`, `z2` are (B, d); row i of both is the same image under two augmentations; every row has
unit length. Each loss is a scalar tensor. Half precision, also that of autocast, is raised to float32,
since e^{1 / 0.07} does not fit float16. CareHubError for other shapes and temperatures <= 0; NaN in gives
NaN out, since to look for it would wait for the device.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CareHubError

SUBTYPES = ("infonce", "alignment", "uniformity", "none")


def info_nce(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """InfoNCE (NT-Xent) of SimCLR: mean over the 2B anchors i of -log(e^{s+ / t} / sum_{k != i} e^{s_k / t}).

    s_k is the cosine similarity to view k, s+ that to the other view of the same image. Written as
    a cross-entropy, which can't overflow. Source: van den Oord et al. 2018, eq. 4; Chen et al.
    2020, eq. 1.

    >>> info_nce(torch.eye(3), torch.eye(3), temperature=0.5)  # log(1 + 4 / e^2)
    tensor(0.4327)
    """
    return F.cross_entropy(_logits(z1, z2, temperature), _positives(z1))


def alignment(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """The part of InfoNCE that pulls the two views of an image together: mean(-s+ / t).

    Source: Wang & Isola 2020, up to constants.

    >>> alignment(torch.eye(3), torch.eye(3), temperature=0.5)
    tensor(-2.)
    """
    z1, z2 = _pair(z1, z2, temperature)
    return -(z1 * z2).sum(dim=1).mean() / temperature


def uniformity(z1: Tensor, z2: Tensor, temperature: float, own_view: bool = False) -> Tensor:
    """The part of InfoNCE that spreads the images over the sphere: mean over the 2B anchors of
    log sum e^{s_k / t} over the 2B - 2 views k of other images.

    `own_view`: over the other view of the same image too, so that augmentations spread as well.
    Source: Wang & Isola 2020, up to constants.

    >>> uniformity(torch.eye(3), torch.eye(3), temperature=0.5)  # log(4 e^0)
    tensor(1.3863)
    >>> uniformity(torch.eye(3), torch.eye(3), temperature=0.5, own_view=True)  # log(4 e^0 + e^2)
    tensor(2.4327)
    """
    negatives = _logits(z1, z2, temperature)
    if not own_view:
        negatives = negatives.scatter(1, _positives(z1)[:, None], float("-inf"))
    return negatives.logsumexp(dim=1).mean()


def contrastive(z1: Tensor, z2: Tensor, temperature: float, subtype: str = "infonce") -> Tensor:
    """InfoNCE or one of its parts by name; "none" is zero (equivariance alone).

    Raises CareHubError for a name that is not in `SUBTYPES`.

    >>> contrastive(torch.eye(3), torch.eye(3), 0.5, "alignment")
    tensor(-2.)
    """
    if subtype == "none":
        return z1.new_zeros(())
    if subtype not in SUBTYPES:
        raise CareHubError(f"there is no loss subtype '{subtype}'; choose from {', '.join(SUBTYPES)}.")
    functions = {"infonce": info_nce, "alignment": alignment, "uniformity": uniformity}
    return functions[subtype](z1, z2, temperature)


def equivariance(z1: Tensor, z2: Tensor, groups: int) -> Tensor:
    """Orthogonal equivariance: changing the augmentation of a group must not change its Gram matrix.

    Rows are `groups` consecutive groups of m = B / groups images. In a group all rows of `z1`
    share one augmentation a and all rows of `z2` another, ã. The Gram matrices agree exactly if an
    orthogonal R turns the one set into the other. Per group: mean over rows i of 2 sum_{j != i}
    (z1_i.z1_j - z2_i.z2_j)^2, then the mean over groups. It grows with m, so λ and the number of
    groups belong together.

    Source: Gupta et al. 2024, eq. 3 (population form), and their code (constants).
    Raises CareHubError if B does not divide into groups of at least 2.

    >>> quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    >>> equivariance(torch.eye(2), torch.eye(2) @ quarter_turn.T, groups=1)
    tensor(0.)
    """
    z1, z2 = _pair(z1, z2)
    batch = len(z1)
    if groups < 1 or batch % groups or batch < 2 * groups:
        raise CareHubError(f"{batch} images don't divide into `groups={groups}` equal groups of at least 2.")
    with torch.autocast(z1.device.type, enabled=False):
        a, b = (z.unflatten(0, (groups, -1)) for z in (z1, z2))
        # j = i needs no mask: rows have unit length, so the diagonals of both Gram matrices are 1.
        return 2 * (a @ a.mT - b @ b.mT).square().sum() / batch


def moco(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE of MoCo: each query (B, d) against its own key (B, d) and the K older keys of `queue` (K, d).

    Keys carry no gradient. Source: He et al. 2020, eq. 1.

    >>> moco(torch.eye(2), torch.eye(2), torch.zeros(3, 2), temperature=0.5)  # log(1 + 3 / e^2)
    tensor(0.3408)
    """
    (queries, keys), queue = _pair(queries, keys.detach(), temperature), _full(queue)
    if queue.ndim != 2 or queue.shape[1] != queries.shape[1]:
        raise CareHubError(f"the queue must be (K, {queries.shape[1]}), got {tuple(queue.shape)}.")
    with torch.autocast(queries.device.type, enabled=False):
        positive = (queries * keys).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, queries @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def _full(z: Tensor) -> Tensor:
    """Half precision raised to float32; float32 and float64 as they are."""
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def _pair(z1: Tensor, z2: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Both as `_full` gives them. Raises CareHubError for what no loss can be computed of."""
    if z1.shape != z2.shape or z1.ndim != 2 or 0 in z1.shape:
        shapes = f"{tuple(z1.shape)} and {tuple(z2.shape)}"
        raise CareHubError(f"a loss compares two views of the same images, each (B, d), got {shapes}.")
    if not 0 < temperature < math.inf:
        raise CareHubError(f"`temperature` must be positive, got {temperature}.")
    return _full(z1), _full(z2)


def _logits(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """(2B, 2B) similarities / temperature between all views; an anchor is never compared with itself."""
    z = torch.cat(_pair(z1, z2, temperature))
    with torch.autocast(z.device.type, enabled=False):
        logits = z @ z.T / temperature
    return logits.fill_diagonal_(float("-inf"))


def _positives(z1: Tensor) -> Tensor:
    """(2B,): for each view the column of the other view of the same image."""
    return torch.arange(2 * len(z1), device=z1.device).roll(len(z1))

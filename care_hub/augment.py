"""Random augmentation of a whole batch on its device, with parameters drawn per image or shared by a group.

`draw` makes the random parameters on the CPU from a generator (a few numbers per image), `apply` turns pictures and
parameters into a view. Drawing for the global batch and slicing (`Draw.rows`) is what makes a run independent of the
number of processes. With equal parameters every operation equals torchvision's functional one (to 2e-6 in float32).
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)  # ITU-R 601 luma, the weights torchvision uses


@dataclass(frozen=True)
class Recipe:
    """What may happen to a picture, and how strongly. Names and meaning as in torchvision's transforms."""

    size: int = 32  # side of the square view, pixels
    scale: tuple[float, float] = (0.08, 1.0)  # area of the crop as a fraction of the picture's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    greyscale: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_taps: int = 3
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Draw:
    """Parameters of n augmentations; every field is a tensor with n rows, on the CPU."""

    box: Tensor  # (n, 4) int64: top, left, height, width of the crop
    flip: Tensor  # (n,) bool
    factors: Tensor  # (n, 4) float32: brightness, contrast, saturation factors, hue shift in turns
    order: Tensor  # (n, 4) int64: which of the four comes first, second, ...; -1 = no jitter
    grey: Tensor  # (n,) bool
    sigma: Tensor  # (n,) float32, pixels; 0 = no blur

    def rows(self, index) -> "Draw":
        return Draw(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))

    def repeat(self, times: int) -> "Draw":
        """Each row `times` times in succession: one augmentation for a group of consecutive images."""
        return Draw(*(getattr(self, f.name).repeat_interleave(times, dim=0) for f in dataclasses.fields(self)))

    @classmethod
    def join(cls, draws: list["Draw"]) -> "Draw":
        """The rows of all `draws`, one after the other."""
        return cls(*(torch.cat([getattr(d, f.name) for d in draws]) for f in dataclasses.fields(cls)))


def generator(seed: int, *path) -> torch.Generator:
    """A CPU generator that depends on `seed` and `path` (stream name, step, ...) alone."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *path))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw(recipe: Recipe, n: int, height: int, width: int, generator: torch.Generator) -> Draw:
    """n independent augmentations of pictures of height x width pixels, distributed as torchvision draws them."""

    def uniform(low, high, *shape):
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    factors = torch.stack([uniform(max(0.0, 1 - s), 1 + s) for s in recipe.jitter[:3]], dim=1)
    hue = uniform(-recipe.jitter[3], recipe.jitter[3])
    order = torch.rand(n, 4, generator=generator).argsort(dim=1)
    order[torch.rand(n, generator=generator) >= recipe.jitter_p] = -1
    sigma = uniform(*recipe.blur_sigma)
    sigma[torch.rand(n, generator=generator) >= recipe.blur] = 0
    return Draw(
        box=_crop_boxes(recipe, n, height, width, generator),
        flip=torch.rand(n, generator=generator) < recipe.flip,
        factors=torch.cat([factors, hue[:, None]], dim=1),
        order=order,
        grey=torch.rand(n, generator=generator) < recipe.greyscale,
        sigma=sigma,
    )


def pair(
    images: Tensor, recipe: Recipe, seed: int, step: int, stream: str, draws: int, rank: int = 0, processes: int = 1,
    cropped: bool = False, stride: int = 1,
) -> Tensor:  # fmt: skip
    """Two views of this process's part of a global batch: (b, 3, H, W) -> (2b, 3, size, size), first view first.

    The batch of all processes holds b * `processes` images; each of the `draws` augmentations of a view serves an equal
    number of consecutive ones. What is drawn depends on (seed, stream, step) and the position in the global batch only.
    `cropped`: no crop here; the pictures have their size, and may be (b, 2, 3, size, size), cut for each view. `stride`: the draws
    serve only every so many images, the others have each their own.
    """
    total = len(images) * processes
    mine = slice(rank * len(images), (rank + 1) * len(images))
    height, width = images.shape[-2:]
    views = []
    for view in (0, 1):
        drawn = draw(recipe, draws, height, width, generator(seed, stream, step, view)).repeat(total // stride // draws)
        if stride > 1:
            own = draw(recipe, total, height, width, generator(seed, stream, "own", step, view))
            place = torch.arange(total)
            drawn = Draw.join([drawn, own]).rows(torch.where(place % stride == 0, place // stride, total // stride + place))
        views.append(drawn.rows(mine))
    both = Draw.join(views)
    if cropped:
        both = replace(both, box=torch.tensor([[0, 0, height, width]]).expand(len(both.box), -1))
    pictures = images.transpose(0, 1).flatten(0, 1) if images.ndim == 5 else images.repeat(2, 1, 1, 1)
    return apply(pictures, both, recipe)


def crop_box(recipe: Recipe, height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """One random crop of a picture of any size: top, left, height, width."""
    return tuple(_crop_boxes(recipe, 1, height, width, generator)[0].tolist())


def _crop_boxes(recipe: Recipe, n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Ten tries each, the first that fits wins, else the largest central crop of an allowed ratio."""
    tries = 10
    area = height * width * (torch.rand(n, tries, generator=generator) * (recipe.scale[1] - recipe.scale[0]) + recipe.scale[0])
    low, high = (math.log(r) for r in recipe.ratio)
    ratio = torch.exp(torch.rand(n, tries, generator=generator) * (high - low) + low)
    w, h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    w, h = w.gather(1, first).squeeze(1), h.gather(1, first).squeeze(1)
    central_w = min(width, round(height * recipe.ratio[1]))
    central_h = min(height, round(width / recipe.ratio[0]))
    none = ~fits.any(dim=1)
    w, h = w.masked_fill(none, central_w), h.masked_fill(none, central_h)
    u, v = torch.rand(n, generator=generator), torch.rand(n, generator=generator)
    top = torch.where(none, (height - h) // 2, ((height - h + 1) * u).long())
    left = torch.where(none, (width - w) // 2, ((width - w + 1) * v).long())
    return torch.stack([top, left, h, w], dim=1)


def apply(images: Tensor, drawn: Draw, recipe: Recipe) -> Tensor:
    """One view: (B, 3, H, W) uint8 (or float in [0, 1]) and B rows of parameters -> (B, 3, size, size) float."""
    x = images.to(torch.get_default_dtype()).mul_(1 / 255) if images.dtype == torch.uint8 else images
    x = crop(x, drawn.box, drawn.flip, recipe.size)
    x = jitter(x, drawn.factors, drawn.order)
    x = greyscale(x, drawn.grey)
    x = blur(x, drawn.sigma, recipe.blur_taps)
    return normalise(x, recipe.mean, recipe.std)


def normalise(x: Tensor, mean, std) -> Tensor:
    mean, scale = torch.tensor(mean, dtype=torch.float64), 1 / torch.tensor(std, dtype=torch.float64)
    shift, scale = (v.to(x.dtype).to(x.device, non_blocking=True).view(3, 1, 1) for v in (-mean * scale, scale))
    return (x * scale).add_(shift)


def crop(x: Tensor, box: Tensor, flip: Tensor, size: int) -> Tensor:
    """Resized crop as two matrix products; flipped ones have their column matrix reversed."""
    if x.shape[2:] == (size, size) and (box == torch.tensor([0, 0, size, size])).all():
        return torch.where(flip.to(x.device, non_blocking=True)[:, None, None, None], x.flip(3), x)
    rows = _resize_matrix(box[:, 0], box[:, 2], x.shape[2], size, x.dtype, torch.zeros_like(flip))
    columns = _resize_matrix(box[:, 1], box[:, 3], x.shape[3], size, x.dtype, flip)
    rows, columns = (m.to(x.device, non_blocking=True) for m in (rows, columns))
    x = torch.bmm(x.flatten(1, 2), columns.transpose(1, 2)).unflatten(1, x.shape[1:3])  # all channels in one product
    return (rows[:, None] @ x).clamp_(0, 1)


def _resize_matrix(start: Tensor, length: Tensor, full: int, size: int, dtype: torch.dtype, flip: Tensor) -> Tensor:
    """(B, size, full) weights of an antialiased (triangle filter) resize of `length` pixels from `start` to `size`."""
    scale = length.double() / size
    place = torch.arange(size, dtype=torch.float64) + 0.5
    centre = torch.where(flip[:, None], size - place, place) * scale[:, None]
    pixel = torch.arange(full) - start[:, None]
    inside = (pixel >= 0) & (pixel < length[:, None])
    weight = (pixel + 0.5).to(dtype)[:, None, :] - centre.to(dtype)[:, :, None]
    weight = weight.abs_().mul_((-1 / scale.clamp(min=1)).to(dtype)[:, None, None]).add_(1).clamp_(min=0).mul_(inside[:, None])
    return weight.mul_(1 / weight.sum(dim=2, keepdim=True))


def jitter(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue in each row's own order."""
    x, factors = x.clone(), factors.to(x.dtype)
    for place in order.T:
        for k, operation in enumerate((_brightness, _contrast, _saturation, _hue)):
            index = (place == k).nonzero().squeeze(1)
            if len(index):
                factor = factors[index, k].to(x.device, non_blocking=True).view(-1, 1, 1, 1)
                where = index.to(x.device, non_blocking=True)
                x.index_copy_(0, where, operation(x.index_select(0, where), factor))
    return x


def rotate(x: Tensor, degrees: float) -> Tensor:
    """(B, 3, S, S) turned counter-clockwise about the centre, bilinear; corners are reflected: black ones would tell the angle."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[c, -s, 0.0], [s, c, 0.0]], dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
    grid = torch.nn.functional.affine_grid(turn, list(x.shape), align_corners=False)
    return torch.nn.functional.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def luma(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    return (x[:, 0:1] * GREY[0]).add_(x[:, 1:2], alpha=GREY[1]).add_(x[:, 2:3], alpha=GREY[2])


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(luma(x).mean(dim=(2, 3), keepdim=True), x, factor).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(luma(x), x, factor).clamp_(0, 1)


def _hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of HSV by `turns` (1 = full circle). The way there sorts the channels by minima and maxima rather than by
    cases; the way back is the closed form of Smith (1978)."""
    red, green, blue = x.unbind(dim=1)
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    value, middle = torch.maximum(red, high), torch.minimum(red, high)
    swapped = (green < blue).to(x.dtype)
    hue = torch.where(red < high, swapped - 1 / 3, -swapped)
    chroma = value - torch.minimum(middle, low)
    hue = hue.addcdiv_(middle - low, chroma.clamp(min=1e-12), value=1 / 6).abs_().add_(turns.squeeze(3))
    offsets = torch.tensor((11 / 6, 9 / 6, 7 / 6), dtype=x.dtype).to(x.device, non_blocking=True).view(3, 1, 1)
    k = (hue[:, None] + offsets).frac_().mul_(6)  # a turn more than needed, so that nothing is negative
    return torch.addcmul(value[:, None], chroma[:, None], torch.minimum(k, 4 - k).clamp_(0, 1), value=-1)


def greyscale(x: Tensor, which: Tensor) -> Tensor:
    index = which.nonzero().squeeze(1).to(x.device, non_blocking=True)
    return x.index_copy(0, index, luma(x[index]).expand(-1, 3, -1, -1)) if len(index) else x


def blur(x: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Gaussian blur, `taps` x `taps` (odd), reflected at the border; rows with sigma 0 stay as they are."""
    index = (sigma > 0).nonzero().squeeze(1)
    if not len(index):
        return x
    reach = taps // 2
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets / sigma[index, None]).square())
    weights = (weights / weights.sum(dim=1, keepdim=True)).to(x.device, x.dtype, non_blocking=True)[:, :, None, None, None]
    where = index.to(x.device, non_blocking=True)
    y = torch.nn.functional.pad(x[where], (reach,) * 4, mode="reflect")
    height, width = x.shape[2:]
    for axis, length in ((2, height), (3, width)):
        shifted = [y.narrow(axis, k, length) for k in range(taps)]
        y = shifted[reach] * weights[:, reach]
        for k in range(reach):  # the kernel is symmetric
            y.addcmul_(shifted[k] + shifted[taps - 1 - k], weights[:, k])
    return x.index_copy(0, where, y)

"""Random augmentation of a whole batch on its device, with parameters per image or shared by a group.

`sample` makes the random parameters on the CPU (a few numbers per image), `apply` turns images and
parameters into a view; it sends the parameters, and never waits for the device. Sampling for the
global batch and taking rows of it is what makes a run independent of the number of processes. With
equal parameters every operation equals torchvision's functional one (to 2e-6 in float32).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CareHubError

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, the weights torchvision uses
CROP_TRIES = 10
CROP_NUMBERS = 2 * CROP_TRIES + 2  # random numbers that a crop is made of
NUMBERS = 13 + CROP_NUMBERS  # and an augmentation


@dataclass(frozen=True)
class AugmentationConfig:
    """What may happen to an image, and how strongly. Names and meaning as in torchvision's transforms.

    >>> AugmentationConfig(size=32, grayscale=0.0).jitter
    (0.4, 0.4, 0.4, 0.1)
    """

    size: int = 32  # side of the square view, pixels
    scale: tuple[float, float] = (0.08, 1.0)  # area of the crop as a fraction of the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    flip: float = 0.5  # probability, as are jitter_p, grayscale and blur
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    grayscale: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    blur_kernel_size: int = 3  # pixels, odd
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        """Raise CareHubError for values that can't be; NaN is in no range."""
        sound = {name: 0 <= getattr(self, name) <= 1 for name in ("flip", "jitter_p", "grayscale", "blur")}
        for name in ("scale", "ratio", "blur_sigma"):
            pair = getattr(self, name)
            sound[name] = len(pair) == 2 and 0 < pair[0] <= pair[1] < math.inf
        sound |= {
            "size": self.size >= 1,
            "jitter": len(self.jitter) == 4 and all(0 <= strength < math.inf for strength in self.jitter),
            "blur_kernel_size": self.blur_kernel_size in range(1, max(2, 2 * self.size), 2) or not self.blur,
            "mean": len(self.mean) == 3 and all(map(math.isfinite, self.mean)),
            "std": len(self.std) == 3 and all(0 < value < math.inf for value in self.std),
        }
        for name, is_sound in sound.items():
            if not is_sound:
                found = f"`{name}={getattr(self, name)}`"
                raise CareHubError(f"no augmentation of {self.size} x {self.size} pixels has {found}.")


@dataclass(frozen=True)
class AugmentationParams:
    """Parameters of n augmentations; every field is a tensor with n rows, on the CPU."""

    box: Tensor  # (n, 4) int64: top, left, height, width of the crop
    flip: Tensor  # (n,) bool
    factors: Tensor  # (n, 4) float32: factors of brightness, contrast, saturation; hue shift in turns
    order: Tensor  # (n, 4) int64: which of the four comes first, second, ...; -1 = no jitter
    gray: Tensor  # (n,) bool
    sigma: Tensor  # (n,) float32, pixels; 0 = no blur

    def __len__(self) -> int:
        return len(self.box)

    def rows(self, index: Tensor | slice) -> "AugmentationParams":
        """The rows at `index`, in its order."""
        return AugmentationParams(*(values[index] for values in vars(self).values()))

    def repeat(self, times: int) -> "AugmentationParams":
        """Each row `times` times in succession: one augmentation for a group of consecutive images."""
        return self.rows(torch.arange(len(self)).repeat_interleave(times))

    @classmethod
    def cat(cls, parts: Sequence["AugmentationParams"]) -> "AugmentationParams":
        """The rows of all `parts`, one after the other."""
        return cls(*map(torch.cat, zip(*(vars(part).values() for part in parts), strict=True)))


def seeded_generator(seed: int, *path: object) -> torch.Generator:
    """A CPU generator that depends on `seed` and `path` (name of a stream, step, ...) alone.

    >>> torch.rand(1, generator=seeded_generator(0, "views", 7))
    tensor([0.3411])
    """
    digest = hashlib.blake2b("/".join(map(str, (seed, *path))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def permutation(count: int, seed: int, *path: object) -> Tensor:
    """(count,): 0 to count - 1 in an order that depends on `seed` and `path`, see `seeded_generator`."""
    return torch.randperm(count, generator=seeded_generator(seed, *path))


def sample(
    config: AugmentationConfig, n: int, height: int, width: int, generator: torch.Generator
) -> AugmentationParams:
    """n independent augmentations of images of height x width pixels, distributed as torchvision's.

    >>> sample(AugmentationConfig(), 2, 32, 32, seeded_generator(0)).box.shape
    torch.Size([2, 4])
    """

    if n < 0 or min(height, width) < 1:
        raise CareHubError(f"there are no {n} augmentations of {height} x {width} pixels.")
    numbers = torch.rand(1, NUMBERS * n, generator=generator)
    return _params_of(config, numbers, height, width)


def _params_of(config: AugmentationConfig, numbers: Tensor, height: int, width: int) -> AugmentationParams:
    """V x n augmentations, made of random `numbers` (V, NUMBERS * n) in [0, 1)."""
    n = numbers.shape[1] // NUMBERS
    # Runs are reproduced from their seed, so the order of these parts is fixed.
    parts = numbers.split([4 * n, 4 * n, n, n, n, CROP_NUMBERS * n, n, n], dim=1)
    factors, order, jittered, sigma, blurred, box, flip, gray = parts
    *strengths, hue = config.jitter
    low = torch.tensor([max(0.0, 1 - strength) for strength in strengths] + [-hue])
    span = torch.tensor([1 + k - max(0.0, 1 - k) for k in strengths] + [2 * hue])
    factors = (factors.unflatten(1, (4, n)) * span[:, None] + low[:, None]).mT.reshape(-1, 4)
    order = order.reshape(-1, 4).argsort(dim=1)
    order.masked_fill_(jittered.reshape(-1, 1) >= config.jitter_p, -1)
    sigma = _uniform(sigma, *config.blur_sigma).masked_fill_(blurred >= config.blur, 0).flatten()
    box = _boxes_of(config, box, height, width)
    return AugmentationParams(
        box, flip.flatten() < config.flip, factors, order, gray.flatten() < config.grayscale, sigma
    )


def _uniform(numbers: Tensor, low: float, high: float) -> Tensor:
    return numbers * (high - low) + low


def sample_crop_box(
    config: AugmentationConfig, height: int, width: int, generator: torch.Generator
) -> tuple[int, int, int, int]:
    """One random crop of an image of any size: top, left, height, width.

    >>> sample_crop_box(AugmentationConfig(scale=(1, 1), ratio=(1, 1)), 20, 50, seeded_generator(0))
    (0, 15, 20, 20)
    """
    top, left, h, w = _sample_crop_boxes(config, 1, height, width, generator)[0].tolist()
    return top, left, h, w


def _sample_crop_boxes(
    config: AugmentationConfig, n: int, height: int, width: int, generator: torch.Generator
) -> Tensor:
    return _boxes_of(config, torch.rand(1, CROP_NUMBERS * n, generator=generator), height, width)


def _boxes_of(config: AugmentationConfig, numbers: Tensor, height: int, width: int) -> Tensor:
    """(V * n, 4) crops made of random `numbers` (V, CROP_NUMBERS * n): the first of ten that fits, else
    the largest central one of an allowed ratio.
    """
    n = numbers.shape[1] // CROP_NUMBERS
    area, ratio, u, v = numbers.split([CROP_TRIES * n, CROP_TRIES * n, n, n], dim=1)
    area = height * width * _uniform(area, *config.scale).reshape(-1, CROP_TRIES)
    ratio = _uniform(ratio, *map(math.log, config.ratio)).reshape(-1, CROP_TRIES).exp_()
    w, h = (area * ratio).sqrt_().round_(), (area / ratio).sqrt_().round_()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    found, first = fits.byte().max(dim=1, keepdim=True)  # the first of equals
    w, h, none_fits = w.gather(1, first)[:, 0].long(), h.gather(1, first)[:, 0].long(), found[:, 0] == 0
    w = w.masked_fill_(none_fits, min(width, round(height * config.ratio[1])))
    h = h.masked_fill_(none_fits, min(height, round(width / config.ratio[0])))
    top = torch.where(none_fits, (height - h) // 2, ((height - h + 1) * u.flatten()).long())
    left = torch.where(none_fits, (width - w) // 2, ((width - w + 1) * v.flatten()).long())
    return torch.stack([top, left, h, w], dim=1)


def two_views(
    images: Tensor,
    config: AugmentationConfig,
    seed: int,
    step: int,
    stream: str,
    draws: int,
    rank: int = 0,
    processes: int = 1,
    crop: bool | str = True,
    stride: int = 1,
) -> Tensor:
    """Two views of this process's part of a global batch: (b, 3, H, W) -> (2b, 3, size, size).

    The first b rows are the first view. The global batch has b * `processes` images; each of the
    `draws` augmentations of a view serves an equal number of consecutive ones. With a `stride`
    they serve every `stride`-th image alone, and the others have one each. All parameters depend
    on (seed, stream, step) and on the place in the global batch only. `crop`: with "shared" each
    image has a crop of its own, the same in both views; if it is False, the images are crops
    already, one for both views or, as (b, 2, 3, size, size), one for each.

    >>> images = torch.zeros(8, 3, 40, 48, dtype=torch.uint8)
    >>> two_views(images, AugmentationConfig(size=32), seed=0, step=0, stream="equivariance", draws=2).shape
    torch.Size([16, 3, 32, 32])
    """
    return apply(
        *sample_for(images, config, seed, step, stream, draws, rank, processes, crop=crop, stride=stride)
    )


def sample_for(
    images: Tensor, config: AugmentationConfig, *path: Any, **options: Any
) -> tuple[Tensor, AugmentationParams, AugmentationConfig]:
    """What `apply` takes for `two_views` of the same arguments."""
    params = sample_two_views(config, len(images), *images.shape[-2:], *path, **options)
    both = images.transpose(0, 1).flatten(0, 1) if images.ndim == 5 else images.repeat(2, 1, 1, 1)
    return both, params, config


def sample_two_views(
    config: AugmentationConfig,
    count: int,
    height: int,
    width: int,
    seed: int,
    step: int,
    stream: str,
    draws: int,
    rank: int = 0,
    processes: int = 1,
    crop: bool | str = True,
    stride: int = 1,
) -> AugmentationParams:
    """The parameters of `two_views` of `count` images of height x width pixels: 2 * count rows."""
    total = count * processes
    if min(draws, stride) < 1 or total % (draws * stride):
        raise CareHubError(f"{total} images don't divide among {draws} augmentations of every {stride}th.")

    def sample_views(n: int, *own: str) -> AugmentationParams:
        """n augmentations of each view, those of the first view before the others."""
        generators = [seeded_generator(seed, stream, *own, step, view) for view in (0, 1)]
        numbers = [torch.rand(NUMBERS * n, generator=generator) for generator in generators]
        return _params_of(config, torch.stack(numbers), height, width)

    place = torch.arange(rank * count, (rank + 1) * count)  # in the global batch
    params, row = sample_views(draws), place // stride // (total // stride // draws)
    row = torch.cat([row, row + draws])
    if stride > 1:
        params = AugmentationParams.cat([params, sample_views(total, "own")])
        own = 2 * draws + torch.cat([place, place + total])
        row = torch.where(place.repeat(2) % stride == 0, row, own)
    if (draws, processes, stride) != (count, 1, 1):  # else they are in order
        params = params.rows(row)
    if crop == "shared":
        boxes = _sample_crop_boxes(config, total, height, width, seeded_generator(seed, stream, "crop", step))
        params = replace(params, box=boxes[place.repeat(2)])
    elif not crop:
        params = replace(params, box=torch.tensor([0, 0, height, width]).expand(len(params), 4))
    return params


def apply(images: Tensor, params: AugmentationParams, config: AugmentationConfig) -> Tensor:
    """One view: (B, 3, H, W) uint8 (or float in [0, 1]) and B rows of parameters -> (B, 3, size, size) float.

    >>> config = AugmentationConfig(size=16)
    >>> params = sample(config, 1, 32, 32, seeded_generator(0)).repeat(4)  # one augmentation for 4 images
    >>> apply(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), params, config).shape
    torch.Size([4, 3, 16, 16])
    """
    (view,) = apply_each([(images, params, config)])
    return view


def apply_each(parts: Sequence[tuple[Tensor, AugmentationParams, AugmentationConfig]]) -> tuple[Tensor, ...]:
    """`apply` of each of several (images, params, config), whose views have one size and normalization.

    All are colored together, so that a GPU is given fewer operations. Raises CareHubError as `apply` does.
    """
    crops = []
    for images, params, config in parts:
        if images.ndim != 4 or images.shape[:2] != (rows := len(params), 3):
            found = f"({rows}, 3, H, W), got {tuple(images.shape)}"
            raise CareHubError(f"{rows} rows of parameters are for {found}.")
        x = images.to(torch.get_default_dtype()).mul_(1 / 255) if images.dtype == torch.uint8 else images
        crops.append(crop(x, params.box, params.flip, config.size))
    if len({(c.size, c.blur_kernel_size, c.mean, c.std) for _, _, c in parts}) > 1:
        raise CareHubError("views of different sizes or normalizations can't be made together.")
    x = crops[0] if len(crops) == 1 else torch.cat(crops)
    params = AugmentationParams.cat([params for _, params, _ in parts])
    x = jitter(x, params.factors, params.order)
    x = grayscale(x, params.gray)
    x = blur(x, params.sigma, config.blur_kernel_size)
    return normalize(x, config.mean, config.std).split([len(each) for each in crops])


def beside(x: Tensor, value: Tensor) -> Tensor:
    """`value`, of the CPU, on the device of `x`: the CPU does not wait for it, unless it is to read it."""
    if x.device.type == "cuda":
        value = value.pin_memory()
    return value.to(x.device, non_blocking=x.device.type != "cpu")


def _channels(x: Tensor, values: Sequence[float]) -> Tensor:
    """(3, 1, 1) on the device of `x`, to which nothing is sent."""
    return torch.cat([x.new_full((1, 1, 1), value) for value in values])


def normalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std of (..., 3, H, W), by channel.

    >>> normalize(torch.ones(3, 1, 1), (0.5, 0.5, 0.5), (0.5, 0.25, 1.0)).flatten()
    tensor([1.0000, 2.0000, 0.5000])
    """
    scale = [1 / value for value in std]
    shift = [-value * factor for value, factor in zip(mean, scale, strict=True)]
    return (x * _channels(x, scale)).add_(_channels(x, shift))


def center_crop(x: Tensor, size: int) -> Tensor:
    """The central size x size square of (..., S, S).

    >>> center_crop(torch.arange(16).view(4, 4), 2)
    tensor([[ 5,  6],
            [ 9, 10]])
    """
    start = (x.shape[-1] - size) // 2
    return x[..., start : start + size, start : start + size]


def crop(x: Tensor, box: Tensor, flip: Tensor, size: int) -> Tensor:
    """Resized crops (B, 3, size, size) of (B, 3, H, W) at `box` (B, 4), mirrored where `flip` (B,) is True.

    The resize is bilinear and antialiased, written as two matrix products.

    >>> x = torch.tensor([[0.0, 0.2], [0.4, 0.6]]).expand(1, 3, 2, 2)
    >>> crop(x, torch.tensor([[0, 0, 2, 2]]), torch.tensor([True]), size=2)[0, 0]
    tensor([[0.2000, 0.0000],
            [0.6000, 0.4000]])
    """
    if x.shape[2:] == (size, size) and (box == torch.tensor([0, 0, size, size])).all():
        if not flip.any():
            return x
        mirrored = beside(x, flip)[:, None, None, None]
        return torch.where(mirrored, x.flip(3), x)
    sent = beside(x, torch.cat([box, flip[:, None]], dim=1))
    top, left, height, width, flip = sent.T[..., None]
    rows = _resize_matrix(x, x.shape[2], top, height, size, torch.zeros_like(flip))
    columns = _resize_matrix(x, x.shape[3], left, width, size, flip)
    # The rows of all channels in one product.
    x = (x.flatten(1, 2) @ columns.mT).unflatten(1, x.shape[1:3])
    return (rows[:, None] @ x).clamp_(0, 1)


def _resize_matrix(x: Tensor, full: int, start: Tensor, length: Tensor, size: int, flip: Tensor) -> Tensor:
    """(B, size, full) weights of an antialiased (triangle filter) resize of `length` pixels from `start`.

    `start`, `length` and `flip` (B, 1) are on the device of `x`; so are the weights, in its dtype.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # which MPS lacks
    scale = length.to(wide) / size
    position = torch.arange(size, dtype=wide, device=x.device) + 0.5
    center = torch.where(flip.bool(), size - position, position) * scale
    pixel = torch.arange(full, device=x.device) - start
    inside = (pixel >= 0) & (pixel < length)
    distance = ((pixel + 0.5).to(x.dtype)[:, None, :] - center.to(x.dtype)[:, :, None]).abs_()
    slope = (-1 / scale.clamp(min=1)).to(x.dtype)[:, None]
    weight = distance.mul_(slope).add_(1).clamp_(min=0).mul_(inside[:, None])
    return weight.mul_(1 / weight.sum(dim=2, keepdim=True))


def jitter(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Color jitter of (B, 3, H, W): brightness, contrast, saturation and hue in each row's own order.

    `factors`, `order` (B, 4) as in `AugmentationParams`.

    >>> order = torch.tensor([[0, -1, -1, -1], [-1, -1, -1, -1]])  # brightness for the first image alone
    >>> jitter(torch.full((2, 3, 1, 1), 0.5), torch.full((2, 4), 0.5), order).flatten(1)
    tensor([[0.2500, 0.2500, 0.2500],
            [0.5000, 0.5000, 0.5000]])
    """
    x, operations = x.clone(), (_brightness, _contrast, _saturation, _hue)
    changes = (factors != torch.tensor([1, 1, 1, 0])).gather(1, order.clamp(min=0))
    kinds = torch.where(changes, order, -1)  # (B, 4): what is done to each row in each turn; -1 is nothing
    counts = (kinds + torch.arange(1, 21, 5)).flatten().bincount(minlength=20).view(4, 5).tolist()
    sent = beside(x, torch.cat([kinds, factors], dim=1))
    turns, factors = sent[:, :4].T.argsort(dim=1, stable=True), sent[:, 4:].to(x.dtype)
    for rows, sizes in zip(turns, counts, strict=True):
        for k, index in enumerate(rows.split(sizes)[1:]):
            if len(index) == len(x):  # all of them: no copies
                x = operations[k](x, factors[:, k].view(-1, 1, 1, 1))
            elif len(index):
                factor = factors[index, k].view(-1, 1, 1, 1)
                x.index_copy_(0, index, operations[k](x.index_select(0, index), factor))
    return x


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(luma(x).mean(dim=(2, 3), keepdim=True), x, factor).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(luma(x), x, factor).clamp_(0, 1)


def _hue(x: Tensor, turns: Tensor) -> Tensor:
    """The hue of HSV rotated by `turns` (1 = full circle).

    To HSV by minima and maxima of channels, not by cases. Source of the way back: Smith 1978.
    """
    red, green, blue = x.unbind(dim=1)
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    value, middle = torch.maximum(red, high), torch.minimum(red, high)
    swapped = (green < blue).to(x.dtype)
    hue = torch.where(red < high, swapped - 1 / 3, -swapped)
    chroma = value - torch.minimum(middle, low)
    hue = hue.addcdiv_(middle - low, chroma.clamp(min=1e-12), value=1 / 6).abs_().add_(turns.squeeze(3))
    # 5/6, 3/6 and 1/6 in the source; a turn more, so that nothing is negative.
    k = (hue[:, None] + _channels(x, (11 / 6, 9 / 6, 7 / 6))).frac_().mul_(6)
    return torch.addcmul(value[:, None], chroma[:, None], torch.minimum(k, 4 - k).clamp_(0, 1), value=-1)


def luma(x: Tensor) -> Tensor:
    """Gray level of an RGB image: (B, 3, H, W) -> (B, 1, H, W).

    >>> luma(torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)).item() == torch.tensor(LUMA[1]).item()
    True
    """
    return (x[:, 0:1] * LUMA[0]).add_(x[:, 1:2], alpha=LUMA[1]).add_(x[:, 2:3], alpha=LUMA[2])


def grayscale(x: Tensor, which: Tensor) -> Tensor:
    """(B, 3, H, W) with the images at `which` (B,) bool in gray.

    >>> x = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1).repeat(2, 1, 1, 1)
    >>> grayscale(x, torch.tensor([True, False])).flatten(1)
    tensor([[0.5870, 0.5870, 0.5870],
            [0.0000, 1.0000, 0.0000]])
    """
    if not which.any():
        return x
    index = beside(x, which.nonzero()[:, 0])
    return x.index_copy(0, index, luma(x[index]).expand(-1, 3, -1, -1))


def blur(x: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Gaussian blur of (B, 3, H, W), kernel_size x kernel_size (odd), reflected at the border.

    `sigma` (B,) in pixels; images with sigma 0 stay as they are.

    >>> x = torch.zeros(1, 3, 5, 5)
    >>> x[:, :, 2, 2] = 1
    >>> blur(x, torch.tensor([1.0]), kernel_size=3)[0, 0, 2]
    tensor([0.0000, 0.1238, 0.2042, 0.1238, 0.0000])
    """
    if kernel_size not in range(1, 2 * min(x.shape[2:]), 2):
        raise CareHubError(f"`kernel_size={kernel_size}` is not odd, or too large for {tuple(x.shape)}.")
    index = (sigma > 0).nonzero()[:, 0]
    if not len(index):
        return x
    reach = kernel_size // 2
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma[index, None]).square())
    weights = weights / weights.sum(dim=1, keepdim=True)
    sent = beside(x, torch.cat([index[:, None], weights], dim=1))
    index, weights = sent[:, 0].long(), sent[:, 1:, None, None, None].to(x.dtype)
    y = F.pad(x[index], (reach,) * 4, mode="reflect")
    for axis in (2, 3):  # a Gaussian is a product: first along the columns, then along the rows
        shifted = [y.narrow(axis, k, x.shape[axis]) for k in range(kernel_size)]
        y = shifted[reach] * weights[:, reach]
        for k in range(reach):  # the kernel is symmetric
            y.addcmul_(shifted[k] + shifted[kernel_size - 1 - k], weights[:, k])
    return x.index_copy(0, index, y)


def rotate(x: Tensor, degrees: float | Tensor) -> Tensor:
    """(B, 3, S, S) rotated counter-clockwise about the center by `degrees`, or (B,) of them; bilinear.

    Beyond the border the image is reflected: black corners would tell the angle.

    >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).expand(1, 3, 2, 2)
    >>> rotate(x, 90)[0, 0].round()
    tensor([[1., 3.],
            [0., 2.]])
    """
    angle = torch.as_tensor(degrees, dtype=torch.float64).deg2rad().expand(len(x))
    c, s, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrix = beside(x, torch.stack([c, -s, zero, s, c, zero], dim=1).view(-1, 2, 3).to(x.dtype))
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)

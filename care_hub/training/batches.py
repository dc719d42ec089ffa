"""Which images a process sees when, and which views of them: a matter of seed, step and place in
the global batch.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from .. import augment
from ..augment import AugmentationConfig, AugmentationParams
from ..config import TrainConfig
from ..data.decode import crop_and_resize, resize_and_center_crop
from ..data.images import Images, StreamedImages
from ..data.sources import dataset_spec
from ..schedule import Plan

Batch = Tensor | tuple[Tensor | None, Tensor | None]  # whole images, or the cut crops
Part = tuple[Tensor, AugmentationParams, AugmentationConfig]  # what `augment.apply` takes


def training_augmentation(config: TrainConfig) -> AugmentationConfig:
    """The augmentation of the contrastive views, with the size and normalization of the data set.

    Raises CareHubError for one, or one of the equivariance views, that can't be.
    """
    spec = dataset_spec(config.dataset_name)
    mean, std = spec.statistics
    augmentation = AugmentationConfig(
        size=config.image_size or spec.size,
        scale=(config.crop_scale, 1.0),
        flip=config.flip,
        jitter=config.jitter,
        jitter_p=config.jitter_p,
        grayscale=config.grayscale,
        blur=config.blur,
        blur_kernel_size=config.blur_kernel_size,
        mean=mean,
        std=std,
    )
    equivariance_augmentation(config, augmentation)  # refused before the first step
    return augmentation


def equivariance_augmentation(config: TrainConfig, augmentation: AugmentationConfig) -> AugmentationConfig:
    """That of the equivariance views: `augmentation` but for what `config` gives them of their own."""
    own = config.equivariance_augmentation
    if "crop_scale" in own:
        own["scale"] = (own.pop("crop_scale"), 1.0)
    return replace(augmentation, **own)


def make_views(
    batch: Batch,
    config: TrainConfig,
    augmentation: AugmentationConfig,
    step: int,
    rank: int,
    processes: int,
    start: int = 0,
) -> tuple[Tensor, ...]:
    """The pair for InfoNCE (sampled per image) and, for CARE, the pair sampled per group; one pair
    where shared.

    `batch`: (b, 3, H, W), or ((b, 2, 3, S, S), the same for the second pair); None for one not needed.
    `augmentation`: of the contrastive views. `step` counts micro-batches, of which `start` is the
    first with an equivariance loss. Each pair is (2b, 3, S, S), first view then second.
    """
    cut = not isinstance(batch, Tensor)
    first, second = (batch, batch) if isinstance(batch, Tensor) else batch
    groups = config.equiv_splits if config.augmentation_scope == "group" else 1

    def views(
        x: Tensor, kind: AugmentationConfig, stream: str, draws: int, crop: bool | str, stride: int = 1
    ) -> Part:
        return augment.sample_for(x, kind, config.seed, step, stream, draws, rank, processes, crop, stride)

    equivariant = config.weight and step >= start
    if first is not None and equivariant and config.views == "shared":
        shared = views(first, augmentation, "shared", groups, not cut, config.equivariance_stride)
        return augment.apply_each([shared])
    parts = []
    if first is not None and not config.steers_alone:
        parts.append(views(first, augmentation, "contrastive", len(first) * processes, not cut))
    if equivariant and second is not None:
        if not cut:
            second = second[:: config.equivariance_stride]
            if not config.equivariance_crop:
                second = augment.center_crop(second, augmentation.size)
        own, crop = equivariance_augmentation(config, augmentation), not cut and config.equivariance_crop
        parts.append(views(second, own, "equivariance", groups, crop))
    return augment.apply_each(parts) if parts else ()


@dataclass(frozen=True)
class ViewCutter:
    """Cuts the views of one streamed image, in a loader process; samples crops as `make_views`
    groups them. `start` is the first micro-batch with an equivariance loss.
    """

    config: TrainConfig
    augmentation: AugmentationConfig
    crop_pct: float
    start: int = 0

    def __call__(self, image: Image.Image, step: int, place: int) -> tuple[list, list]:
        """Crops for the contrastive pair, and for the equivariance pair (none where that does not
        see the image).

        `place`: of the image in the global batch.
        """
        c = self.config
        groups = c.equiv_splits if c.augmentation_scope == "group" else 1
        group = place // (c.batch_size // groups)
        outside = place % c.equivariance_stride != 0  # of the part that the equivariance loss sees
        equivariant = c.weight and step >= self.start
        if equivariant and c.views == "shared":
            stream, unit = ("shared own", place) if outside else ("shared", group)
            return self._crops(image, self.augmentation, stream, step, unit), []
        contrastive = []
        if not c.steers_alone:
            contrastive = self._crops(image, self.augmentation, "contrastive", step, place)
        if not equivariant or outside:
            return contrastive, []
        if not c.equivariance_crop:
            return contrastive, [resize_and_center_crop(image, self.augmentation.size, self.crop_pct)] * 2
        own = equivariance_augmentation(c, self.augmentation)
        if c.equivariance_crop == "shared":
            return contrastive, self._crops(image, own, "equivariance shared", step, place, views=1) * 2
        return contrastive, self._crops(image, own, "equivariance", step, group)

    def _crops(
        self, image: Image.Image, kind: AugmentationConfig, stream: str, step: int, unit: int, views: int = 2
    ) -> list[Image.Image]:
        crops = []
        for view in range(views):
            generator = augment.seeded_generator(self.config.seed, stream, "crop", step, view, unit)
            box = augment.sample_crop_box(kind, image.height, image.width, generator)
            crops.append(crop_and_resize(image, box, kind.size))
        return crops


def training_batches(
    config: TrainConfig,
    plan: Plan,
    images: Images,
    augmentation: AugmentationConfig,
    start: int,
    rank: int,
    processes: int,
) -> Generator[Batch, None, None]:
    """What `make_views` takes, for every micro-batch from optimizer step `start` on."""
    indices = epoch_order(config, plan, len(images), start, rank, processes)
    if not isinstance(images, StreamedImages):
        yield from images.batches(indices)
        return
    first, place = start * config.gradient_accumulation, rank * (config.batch_size // processes)
    jobs = ((index, first + k, place) for k, index in enumerate(indices))
    crop_pct, weighted = augmentation.size / images.size, plan.weight_start * config.gradient_accumulation
    yield from images.cut_batches(jobs, ViewCutter(config, augmentation, crop_pct, weighted))


def epoch_order(
    config: TrainConfig, plan: Plan, images: int, start: int, rank: int, processes: int
) -> Iterator[Tensor]:
    """This process's indices of every micro-batch from step `start` on; epochs are shuffled by
    (seed, epoch).
    """
    size, per_epoch = config.batch_size // processes, plan.steps_per_epoch * config.gradient_accumulation
    first, last = start * config.gradient_accumulation, plan.stop * config.gradient_accumulation
    shuffled = torch.empty(0)
    for k in range(first, last):
        epoch, place = divmod(k, per_epoch)
        if k == first or place == 0:
            shuffled = augment.permutation(images, config.seed, "order", epoch)
        begin = place * config.batch_size + rank * size
        yield shuffled[begin : begin + size]

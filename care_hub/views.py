"""Which pictures a process sees when, and which views of them: a matter of seed, step and place in the global batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import augment
from .config import Plan, TrainConfig
from .data import pictures, sources
from .data.sources import center


def recipe_of(config: TrainConfig, images: sources.Images) -> augment.Recipe:
    about = sources.spec(config.dataset_name)
    return augment.Recipe(
        size=config.image_size or about.size, scale=(config.crop_scale, 1.0), jitter=config.jitter, jitter_p=config.jitter_p,
        greyscale=config.greyscale, blur=config.blur, blur_taps=config.blur_taps, mean=about.statistics[0], std=about.statistics[1],
    )  # fmt: skip


def make_views(images, config: TrainConfig, recipe: augment.Recipe, step: int, rank: int, processes: int) -> tuple:
    """The pair for InfoNCE (drawn per image) and, for CARE, the pair drawn per group. (One pair where they are shared.)

    `images`: (b, 3, H, W), or what loader processes have cut: ((b, 2, 3, S, S), and for the second pair the same or None).
    """
    cut = isinstance(images, tuple | list)
    first, second = images if cut else (images, images)
    arguments = (recipe, config.seed, step)
    groups = config.equiv_splits if config.augmentation_scope == "group" else 1
    if config.weight and config.views == "shared":
        return (augment.pair(first, *arguments, "shared", groups, rank, processes, cropped=cut, stride=config.equivariance_stride),)
    views = augment.pair(first, *arguments, "contrastive", len(first) * processes, rank, processes, cropped=cut)
    if not config.weight:
        return (views,)
    if not cut:
        second = second[:: config.equivariance_stride]
        second = second if config.equivariance_crop else center(second, recipe.size)
    cropped = cut or not config.equivariance_crop
    return views, augment.pair(second, *arguments, "equivariance", groups, rank, processes, cropped=cropped)


@dataclass(frozen=True)
class Cutter:
    """Cuts the views of one streamed picture, in a loader process; draws as `make_views` groups them."""

    config: TrainConfig
    recipe: augment.Recipe
    crop_pct: float

    def __call__(self, picture, step: int, place: int) -> tuple[list, list]:
        c = self.config
        per_group = c.batch_size // (c.equiv_splits if c.augmentation_scope == "group" else 1)
        if c.weight and c.views == "shared":
            alone = place % c.equivariance_stride
            return self._cut(picture, *(("shared own", step, place) if alone else ("shared", step, place // per_group))), []
        contrastive = self._cut(picture, "contrastive", step, place)
        if not c.weight or place % c.equivariance_stride:
            return contrastive, []
        if not c.equivariance_crop:
            return contrastive, [pictures.fit(picture, self.recipe.size, self.crop_pct)] * 2
        return contrastive, self._cut(picture, "equivariance", step, place // per_group)

    def _cut(self, picture, stream: str, step: int, unit: int) -> list:
        generators = [augment.generator(self.config.seed, stream, "crop", step, view, unit) for view in (0, 1)]
        boxes = [augment.crop_box(self.recipe, picture.height, picture.width, g) for g in generators]
        return [pictures.cut(picture, box, self.recipe.size) for box in boxes]


def training_batches(config: TrainConfig, plan: Plan, images: sources.Images, recipe, start: int, rank: int, processes: int) -> Iterator:
    """What `make_views` takes, for every micro-batch from step `start` on."""
    indices = order(config, plan, len(images), start, rank, processes)
    if images.held is not None:
        return images.batches(indices)
    first, place = start * config.gradient_accumulation, rank * (config.batch_size // processes)
    jobs = ((index, first + k, place) for k, index in enumerate(indices))
    return images.cut_batches(jobs, Cutter(config, recipe, recipe.size / images.size))


def order(config: TrainConfig, plan: Plan, images: int, start: int, rank: int, processes: int) -> Iterator[Tensor]:
    """This process's indices of every micro-batch from step `start` on; epochs are shuffled by (seed, epoch)."""
    size, per_epoch = config.batch_size // processes, plan.steps_per_epoch * config.gradient_accumulation
    first, last = start * config.gradient_accumulation, plan.stop * config.gradient_accumulation
    for k in range(first, last):
        epoch, place = divmod(k, per_epoch)
        if place == 0 or k == first:
            shuffled = torch.randperm(images, generator=augment.generator(config.seed, "order", epoch))
        yield shuffled[place * config.batch_size + rank * size :][:size]

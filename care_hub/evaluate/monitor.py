"""What is measured during and after training, by all processes together."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from .. import augment
from ..config import TrainConfig
from ..data.sources import Images, center
from ..encoder import Encoder
from ..measures import knn_top1
from .equivariance import augmentations, embed_view, rotation_errors


def embed_all(
    encoder: Encoder,
    images: Images,
    accelerator: Accelerator,
    space: str,
    batch: int = 500,
    view: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """(N, d) embeddings of all images, each process doing its share. `view`: (pictures, indices) -> what the encoder sees of
    them; by default their central square."""
    processes, rank = accelerator.num_processes, accelerator.process_index
    share = -(-len(images) // processes)
    mine = torch.arange(rank * share, (rank + 1) * share).clamp(max=len(images) - 1)
    indices = mine.split(batch)
    view = view or (lambda x, _: center(x, encoder.care["image_size"]))
    parts = [encoder.embed(view(x, index), space) for x, index in zip(images.batches(indices), indices, strict=True)]
    return accelerator.gather(torch.cat(parts))[: len(images)]


def some_of(count: int, wanted: int, seed: int = 0) -> Tensor:
    """At most `wanted` indices of `count` images, in an order drawn by `seed`: data sets are often sorted by class."""
    return torch.randperm(count, generator=augment.generator(seed, "images"))[:wanted]


def bank_of(config: TrainConfig, images: Images) -> Images:
    """`knn_bank` labelled pictures, fixed by the seed (the unlabeled ones of stl10 have no vote)."""
    labelled = (images.labels >= 0).nonzero().squeeze(1)
    if len(labelled) == len(images) <= config.knn_bank:
        return images
    return images.take(labelled[torch.randperm(len(labelled), generator=augment.generator(config.seed, "bank"))][: config.knn_bank])


def knn(config: TrainConfig, encoder: Encoder, data: dict, accelerator: Accelerator, columns=("label",)) -> list[float | None]:
    """kNN top-1 on backbone features, in per cent, for each of `columns`; None without labels or a test split."""
    train, test = data["train"], data["test"]
    if test is None or test.labels is None or train.labels is None or not (train.labels >= 0).any():
        return [None] * len(columns)
    bank = bank_of(config, train)
    features, queries = (embed_all(encoder, images, accelerator, "backbone") for images in (bank, test))
    answers = ([i.labels if c == "label" else i.columns[c] for i in (bank, test)] for c in columns)
    return [knn_top1(features, known.to(features.device), queries, truth.to(features.device)) for known, truth in answers]


def closing(config: TrainConfig, encoder: Encoder, data: dict, recipe: augment.Recipe, accelerator: Accelerator) -> dict:
    """The closing figures: kNN, and the rotation protocol on 2,000 held-out images (half fitted, half measured).

    A run cut short by --max-steps is measured only if --knn-every asks for it.
    """
    if config.max_steps and not config.knn_every:
        return {}
    columns = {"knn_top1": "label"} | ({"knn_color_top1": "color"} if config.dataset_name == "shapes" else {})
    results = dict(zip(columns, knn(config, encoder, data, accelerator, tuple(columns.values())), strict=True))
    if accelerator.is_main_process:
        images = data["test"] or data["train"]
        pixels = center(images.take(some_of(len(images), 2000)).held, recipe.size)
        views = (embed_view(encoder, pixels, a) for a in augmentations("full recipe", recipe, draws=16))
        results |= rotation_errors(embed_view(encoder, pixels), views)
    accelerator.wait_for_everyone()
    return {k: round(v, 4) for k, v in results.items() if v is not None and v == v}

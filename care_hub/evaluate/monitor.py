"""What is measured during and after training, by all processes together."""

import torch
from accelerate import Accelerator
from torch import Tensor

from .. import augment
from ..config import TrainConfig
from ..data.sources import Images, center
from ..encoder import Encoder
from .equivariance import augmented, rotation_errors
from .knn import knn_top1


def embed_all(encoder: Encoder, images: Images, accelerator: Accelerator, space: str, batch: int = 500) -> Tensor:
    """(N, d) embeddings of all images, each process doing its share."""
    processes, rank = accelerator.num_processes, accelerator.process_index
    share = -(-len(images) // processes)
    mine = torch.arange(rank * share, (rank + 1) * share).clamp(max=len(images) - 1)
    parts = [encoder.embed(center(x, encoder.care["image_size"]), space) for x in images.batches(mine.split(batch))]
    return accelerator.gather(torch.cat(parts))[: len(images)]


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
        some = images.take(torch.arange(min(2000, len(images))))
        pixels = some.held.to(accelerator.device)
        z = torch.cat([encoder.embed(center(b, recipe.size)) for b in pixels.split(500)])
        results |= rotation_errors(z, augmented(encoder.embed, pixels, recipe))
    accelerator.wait_for_everyone()
    return {k: round(v, 4) for k, v in results.items() if v is not None}

"""What is measured during and after training, by all processes together."""

from typing import Any

from accelerate import Accelerator

from ..augment import AugmentationConfig, center_crop, permutation
from ..config import TrainConfig
from ..data.images import Images
from ..encoder import Encoder
from ..metrics import knn_top1
from .commands import rounded
from .equivariance import augmentations, measure_equivariance, rotation_errors
from .features import embed_all, embed_view, random_subset

FINAL_IMAGES = 2000  # held-out images of the rotation protocol: half fitted, half measured
FINAL_DRAWS = 8  # changes of color to which rotations are fitted


def knn_bank(config: TrainConfig, images: Images) -> Images | None:
    """`knn_bank` labeled images, fixed by the seed; None where no label is known.

    The unlabeled images of stl10 (label -1) have no vote.
    """
    if images.labels is None or not (images.labels >= 0).any():
        return None
    known = (images.labels >= 0).nonzero()[:, 0]
    if len(known) == len(images) <= config.knn_bank:
        return images
    order = permutation(len(known), config.seed, "bank")
    return images.take(known[order][: config.knn_bank])


def knn_monitor(
    config: TrainConfig,
    encoder: Encoder,
    train: Images,
    test: Images | None,
    accelerator: Accelerator,
    columns: tuple[str, ...] = ("label",),
) -> list[float | None]:
    """kNN top-1 on backbone features, in percent, for each of `columns` ("label" or a factor of the images).

    None for all of them without labels or a test split.
    """
    bank = knn_bank(config, train)
    if bank is None or bank.labels is None or test is None or test.labels is None:
        return [None] * len(columns)
    x, queries = (embed_all(encoder, images, accelerator, "backbone") for images in (bank, test))
    known, truth = bank.columns | {"label": bank.labels}, test.columns | {"label": test.labels}
    top1: list[float | None] = []
    for name in columns:
        seen = truth[name] >= 0
        top1.append(knn_top1(x, known[name].to(x.device), queries[seen], truth[name][seen].to(x.device)))
    return top1


def final_results(
    config: TrainConfig,
    encoder: Encoder,
    train: Images,
    test: Images | None,
    augmentation: AugmentationConfig,
    accelerator: Accelerator,
) -> tuple[dict[str, float], dict[str, Any]]:
    """The final results of a run: kNN; on 2,000 held-out images the rotation errors, and what color does.

    The latter also by family, as `measure_equivariance` gives it. On the main process; both empty
    for a run that `max_steps` cuts short, unless `knn_every` asks for them.
    """
    families: dict[str, Any] = {}
    if config.max_steps and not config.knn_every:
        return {}, families
    columns = {"knn_top1": "label"}
    if config.dataset_name == "shapes":
        columns["knn_color_top1"] = "color"
    top1 = knn_monitor(config, encoder, train, test, accelerator, tuple(columns.values()))
    results = dict(zip(columns, top1, strict=True))
    images = test or train
    if accelerator.is_main_process and len(images) > 1:  # one to fit, one to measure
        subset = images.take(random_subset(len(images), FINAL_IMAGES))
        pixels = center_crop(subset.pixels, augmentation.size)
        views = (embed_view(encoder, pixels, a) for a in augmentations("full recipe", augmentation, 16))
        results |= rotation_errors(embed_view(encoder, pixels), views)
        families = measure_equivariance(encoder, pixels, augmentation, FINAL_DRAWS, families=["color"])
        for name in ("motion", "same_image_hit_at_1"):
            results[f"color_{name}"] = families["color"][name][0]
    accelerator.wait_for_everyone()
    return rounded({k: v for k, v in results.items() if v is not None and v == v}), families

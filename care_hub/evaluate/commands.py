"""What eval_linear.py, `care-hub knn` and `care-hub equivariance` do, from names to saved results."""

import json
import logging
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from accelerate import Accelerator

from ..augment import AugmentationConfig
from ..config import DataConfig, EvalConfig, plain_values
from ..data.images import Images, InMemoryImages
from ..data.sources import load_splits, recorded_options
from ..distributed import inference_accelerator
from ..encoder import Encoder
from ..errors import CareHubError
from ..factory import any_encoder, push_export
from ..files import make_folder, write_text
from ..hub.card import write_card
from ..hub.client import check_push
from ..hub.evaluation_record import add_result, read_record
from ..hub.export import copy_export, export_folder, read_config, sha256
from ..hub.linear_head import LinearHead
from ..hub.registry import locate
from ..metrics import effective_rank, knn_top1
from ..report.figures import plot_geometry, plot_neighbors
from .attributes import probe_attributes
from .equivariance import measure_equivariance
from .features import (
    LabeledImages,
    embed_all,
    embed_view,
    labeled,
    random_subset,
    recorded_augmentation,
)
from .finetune import finetune
from .linear import linear_probe

logger = logging.getLogger(__name__)

PROBE_IMAGES = 5000  # training images of the attribute probes


def record(folder: Path, kind: str, dataset: str, results: dict[str, Any]) -> None:
    """Save results beside the encoder in `folder` and show them in its card; says what they replace."""
    before = read_record(folder).get(kind, {}).get(dataset, {})
    if before.keys() & results:
        logger.info("This replaces what was measured on '%s' before, in '%s'.", dataset, folder)
    add_result(folder, kind, dataset, results)
    write_card(folder)


def _own_folder(source: str) -> Path | None:
    """The export folder where results on `source` are saved; None for what is not the user's to change."""
    if not os.path.isdir(source):
        return None
    folder = locate(source)
    try:
        read_config(folder)  # in a folder of timm's there is no card of ours
        return make_folder(folder)
    except CareHubError as error:
        logger.warning("The results are shown and not saved: %s", error)
        return None


def open_splits(encoder: Encoder, data: DataConfig, accelerator: Accelerator) -> tuple[Images, Images]:
    """Training and test images for `encoder`. Raises CareHubError without a test split."""
    train, test = load_splits(data, encoder.config.image_size, accelerator.is_main_process)
    if test is None:
        raise CareHubError(f"'{data.dataset_name}' has no test split to measure on.")
    return train, test


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """What eval_linear.py does: train a head, or fine-tune; save it with the card, maybe push it.

    Returns the result on the main process, and an empty dict on the others. Raises CareHubError.
    """
    if config.push_to_hub:
        check_push(config.push_to_hub)
    folder = locate(config.encoder)
    finetuned = config.protocol == "finetune"
    target = target_folder(config.encoder, folder, config.output_dir, new_weights=finetuned)
    accelerator = inference_accelerator()
    encoder = Encoder.from_folder(folder).to(accelerator.device)
    train, test = labeled(config.dataset_name, *open_splits(encoder, config, accelerator))
    if config.protocol == "finetune":
        heads, encoder = finetune(encoder, train, test, accelerator, config)
        encoder.config = replace(encoder.config, projection=None, results={}, finetuned=config.data_label)
    else:
        heads = linear_probe(encoder, train, test, accelerator, config)
    if not accelerator.is_main_process:
        return {}
    if config.protocol == "finetune":
        encoder.save_pretrained(target)
    elif target.absolute() != folder.absolute():
        copy_export(folder, target)
    if config.label_fraction == 1:
        file = replace(heads[0], encoder=sha256(target / "model.safetensors")).save(target)
        logger.info("The head is '%s'; the result is in the card beside it, too.", file)
    else:
        logger.info("The result is in the card in '%s'; a head of a part of the labels is not saved.", target)
    results = mean_over_seeds(heads)
    record(target, "accuracy", config.data_label, {config.protocol_name: results})
    if config.push_to_hub:
        logger.info(push_export(target, config.push_to_hub))
    return {"encoder": config.encoder, "dataset": config.data_label} | results


def target_folder(source: str, folder: Path, output_dir: str | None, new_weights: bool = False) -> Path:
    """Where results on the encoder `source`, found in `folder`, go: a folder that is made if need be.

    Raises CareHubError if there is none to write to, and if an encoder would be lost there.
    """
    if output_dir is None and not os.path.isdir(source):
        raise CareHubError(f"'{source}' is not a folder of yours; results need an `output_dir`.")
    target = make_folder(output_dir or folder)
    if (target / "config.json").is_file():
        export_folder(target)  # which finishes what was interrupted there
    there = target / "model.safetensors"
    if there.is_file() and (new_weights or sha256(there) != sha256(folder / there.name)):
        raise CareHubError(f"'{target}' already contains an encoder; choose another `output_dir`.")
    return target


def mean_over_seeds(heads: list[LinearHead]) -> dict[str, Any]:
    """The metrics of heads of several seeds as one: means of accuracies (and deviations) and seconds."""
    rows = [head.metrics for head in heads]
    if len(rows) == 1:
        return rows[0]
    results = rows[0] | {"seeds": len(rows)}
    for name in ("top1", "top5"):
        values = [row[name] for row in rows]
        results[name] = round(mean(values), 2)
        results[f"{name}_std"] = round(stdev(values), 2)
    results["head_seconds"] = round(mean(row["head_seconds"] for row in rows), 2)
    return results


def evaluate_knn(
    source: str, data: DataConfig, k: int = 200, temperature: float = 0.5, bank: int | None = None
) -> dict[str, Any]:
    """`care-hub knn`: weighted kNN top-1 on backbone features.

    The training images vote, or `bank` of them. Saved beside an encoder that is a folder. Returns
    the result on the main process, and an empty dict on the others. Raises CareHubError.
    """
    accelerator = inference_accelerator()
    encoder = Encoder.from_folder(locate(source)).to(accelerator.device)
    splits = labeled(data.dataset_name, *open_splits(encoder, data, accelerator))
    results = knn_results(encoder, *splits, accelerator, k, temperature, bank) | recorded_options(data)
    if not accelerator.is_main_process:
        return {}
    if folder := _own_folder(source):
        record(folder, "accuracy", data.data_label, {"kNN": results})
    return {"encoder": source, "dataset": data.data_label} | results


def knn_results(
    encoder: Encoder,
    train: LabeledImages,
    test: LabeledImages,
    accelerator: Accelerator,
    k: int,
    temperature: float,
    bank: int | None,
) -> dict[str, Any]:
    """What is recorded of weighted kNN, in which `bank` of the training images vote, or all."""
    if bank is not None and bank < len(train):
        train = train.take(random_subset(len(train), bank))
    titled = {"training images": train, "test images": test}.items()
    x, queries = (embed_all(encoder, s.images, accelerator, "backbone", title=title) for title, s in titled)
    top1 = knn_top1(x, train.labels.to(x.device), queries, test.labels.to(x.device), k, temperature)
    results = {"top1": round(top1, 2), "k": k, "temperature": temperature}
    return results | {"n_train": len(train), "n_test": len(test)}


def evaluate_equivariance(
    names: tuple[str, ...],
    data: DataConfig,
    images: int = 2000,
    draws: int = 16,
    seed: int = 0,
    output: str | None = None,
) -> dict[str, dict[str, Any]]:
    """`care-hub equivariance`: rotations by augmentation family, and attribute probes.

    Each of the encoders `names`, of care_hub or of timm, sees the same `images` test images under
    the same augmentations; "full recipe" is that of the first. The sphere is that of the
    projection, or of backbone features where there is no head. Results are saved beside each
    encoder that is a folder; tables and figures of all of them in `output`. The main process does
    it all, alone; the others return an empty dict at once. Raises CareHubError.
    """
    accelerator = inference_accelerator()
    if not accelerator.is_main_process:
        return {}
    target = make_folder(output) if output else None
    encoders = {name: any_encoder(name).to(accelerator.device) for name in names}
    _check_comparable(encoders)
    if not names:
        raise CareHubError("there is no encoder to measure; name at least one.")
    first, dataset = encoders[names[0]], data.data_label
    splits = open_splits(first, data, accelerator)
    train, test = equivariance_subsets(*splits, images)
    if len(test) < 4:
        raise CareHubError(f"'{dataset}' has {len(test)} test images, too few to fit and measure rotations.")
    recipe = recorded_augmentation(first.config)
    results = {}
    for name, encoder in encoders.items():
        results[name] = equivariance_results(encoder, train, test, recipe, draws, seed)
        results[name] |= {"n_test": len(splits[1])} | recorded_options(data)
        if recipe != recorded_augmentation(encoder.config):
            results[name]["recipe"] = plain_values(asdict(recipe))
        if folder := _own_folder(name):
            plot_geometry({name: results[name]}, folder / f"equivariance.{dataset.replace('/', '--')}.png")
            record(folder, "equivariance", dataset, results[name])
    if target:
        text = json.dumps({"dataset": dataset, "encoders": results}, indent=2)
        write_text(target / "equivariance.json", text + "\n")
        plot_geometry(results, target / "equivariance.png")
        plot_neighbors(encoders, test, target / "neighbors.png")
    return results


def equivariance_subsets(train: Images, test: Images, images: int) -> tuple[InMemoryImages, InMemoryImages]:
    """The training images of the attribute probes, and so many test images."""
    subsets = ((train, PROBE_IMAGES), (test, images))
    probes, measured = (split.take(random_subset(len(split), count)) for split, count in subsets)
    return probes, measured


def equivariance_results(
    encoder: Encoder,
    train: InMemoryImages,
    test: InMemoryImages,
    recipe: AugmentationConfig,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """What is recorded of families of augmentations ("full recipe" is `recipe`) and attribute probes."""
    space, progress = "backbone" if encoder.projection is None else "projection", sys.stderr.isatty()
    found = {
        "space": space,
        "images": len(test),
        "draws": draws,
        "seed": seed,
        "families": measure_equivariance(encoder, test.pixels, recipe, draws, seed, progress=progress),
        "effective_rank": effective_rank(embed_view(encoder, test.pixels, space=space)),
        "attributes": probe_attributes(encoder, train, test, seed),
    }
    return rounded(found)


def _check_comparable(encoders: dict[str, Encoder]) -> None:
    sizes = sorted({encoder.config.image_size for encoder in encoders.values()})
    if len(sizes) > 1:
        words = " and ".join(map(str, sizes))
        raise CareHubError(f"encoders of {words} px see different images and can't be compared.")


def rounded(value: Any) -> Any:
    """Numbers to five significant digits, in whatever they are nested in; None for NaN, not in JSON.

    >>> rounded({"error": (0.123456789, float("nan")), "images": 200})
    {'error': [0.12346, None], 'images': 200}
    """
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if value == value else None
    return value

"""What eval_linear.py, `care-hub knn` and `care-hub equivariance` do, from a name to results that are kept."""

import json
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from .. import figures, hub, measures
from ..config import EvalConfig
from ..data import sources
from ..data.sources import Images
from ..distributed import start
from ..encoder import Encoder
from ..errors import CareHubError
from ..export import sha256
from ..registry import locate
from . import record
from .equivariance import geometry, recipe_of
from .finetune import finetune
from .linear import probe
from .monitor import embed_all, some_of
from .readout import kept


@dataclass
class Subject:
    """An encoder to be judged, where it lies, and whether results may be kept beside it."""

    name: str
    folder: Path
    encoder: Encoder
    ours: bool  # a folder of the person's, not a cache

    @classmethod
    def open(cls, source: str, device) -> "Subject":
        folder = locate(source)
        return cls(source, folder, Encoder.from_folder(folder).to(device), Path(source).is_dir())


def load(encoder: Encoder, dataset: str, data_root: str | None, accelerator: Accelerator, **options) -> tuple[Images, Images]:
    """Training and test pictures for `encoder`. Raises CareHubError without a test split."""
    size = encoder.care["image_size"]
    train, test = sources.load_both(dataset, data_root, size=size, progress=accelerator.is_main_process, **options)
    if test is None:
        raise CareHubError(f"'{dataset}' has no test split to measure on.")
    return train, test


def labelled(dataset: str, train: Images, test: Images) -> tuple[Images, Images]:
    """Both without the pictures whose label is not known."""
    if train.labels is None or test.labels is None or not (train.labels >= 0).any():
        raise CareHubError(f"this needs labels in a training and a test split, which '{dataset}' does not have.")
    train, test = (i if (i.labels >= 0).all() else i.take((i.labels >= 0).nonzero().squeeze(1)) for i in (train, test))
    train.class_names = train.class_names or [str(k) for k in range(int(max(train.labels.max(), test.labels.max())) + 1)]
    return train, test


def evaluate(config: EvalConfig) -> dict:
    """`eval_linear.py`: train a head, or fine-tune; save it with the card, maybe push; returns the result (on the main
    process, else nothing)."""
    if config.push_to_hub:
        hub.check_push(config.push_to_hub)
    if config.output_dir is None and not Path(config.encoder).is_dir():
        locate(config.encoder)
        raise CareHubError(f"'{config.encoder}' is not a folder of yours; say by --output-dir where encoder and head shall be saved.")
    folder = locate(config.encoder)
    target = Path(config.output_dir or folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CareHubError(f"the folder '{target}' can't be written ({error.strerror}).") from error
    other = target / "model.safetensors"
    if other.is_file() and (config.protocol == "finetune" or sha256(other) != sha256(folder / "model.safetensors")):
        raise CareHubError(f"'{target}' already holds an encoder, which would be lost; choose another --output-dir.")
    accelerator = start()
    encoder = Encoder.from_folder(folder).to(accelerator.device)
    columns = {"image_column": config.image_column, "label_column": config.label_column}
    options = {"workers": config.num_workers, "skip_broken": config.skip_broken_images, **columns}
    data = load(encoder, config.dataset_name, config.data_root, accelerator, **options)
    train, test = labelled(config.dataset_name, *data)
    if config.protocol == "finetune":
        heads, tuned = finetune(encoder, train, test, accelerator, config)
    else:
        heads, tuned = probe(encoder, train, test, accelerator, config), None
    if not accelerator.is_main_process:
        return {}
    results = summary([head.metrics for head in heads])
    if tuned is not None:
        tuned.care = tuned.care | {"projection": None, "results": {}, "finetuned": config.dataset_name}
        tuned.save_pretrained(target)
    elif target.absolute() != folder.absolute():
        for path in (p for p in folder.iterdir() if p.is_file()):
            shutil.copy(path, target / path.name)
    if config.label_fraction == 1:
        heads[0].encoder = sha256(target / "model.safetensors")
        heads[0].save(target)
    record.add(target, "accuracy", config.dataset_name, {config.label: results})
    if config.push_to_hub:
        print(hub.push(target, config.push_to_hub), file=sys.stderr)
    return {"encoder": config.encoder, "dataset": config.dataset_name} | results


def summary(rows: list[dict]) -> dict:
    """The metrics of several seeds as one: accuracies and seconds are means, accuracies with their standard deviation."""
    if len(rows) == 1:
        return rows[0]
    answer = rows[0] | {"seeds": len(rows)}
    for name in ("top1", "top5"):
        values = [row[name] for row in rows]
        answer[name], answer[f"{name}_std"] = round(statistics.mean(values), 2), round(statistics.stdev(values), 2)
    answer["head_seconds"] = round(statistics.mean(row["head_seconds"] for row in rows), 2)
    return answer


def knn(source: str, dataset: str, data_root: str | None, k: int, temperature: float, bank: int | None, **options) -> dict:
    """`care-hub knn`: weighted kNN top-1 on backbone features, the training pictures (or `bank` of them) voting."""
    accelerator = start()
    subject = Subject.open(source, accelerator.device)
    train, test = labelled(dataset, *load(subject.encoder, dataset, data_root, accelerator, **options))
    train = train.take(some_of(len(train), bank)) if bank and bank < len(train) else train
    x, queries = (embed_all(subject.encoder, images, accelerator, "backbone") for images in (train, test))
    top1 = measures.knn_top1(x, train.labels.to(x.device), queries, test.labels.to(x.device), k, temperature)
    results = {"top1": round(top1, 2), "k": k, "temperature": temperature, "n_train": len(train), "n_test": len(test)}
    if not accelerator.is_main_process:
        return {}
    if subject.ours:
        record.add(subject.folder, "accuracy", dataset, {"kNN": results})
    return {"encoder": source, "dataset": dataset} | results


def equivariance(
    names: tuple[str, ...], dataset: str, data_root: str | None, images: int, draws: int, seed: int, output: str | None, **options
) -> dict:
    """`care-hub equivariance`: geometry by family and what is kept, for each of the encoders `names` on the same pictures and draws;
    "full recipe" is that of the first.

    Kept beside each encoder that is a folder; tables and figures of all of them in `output`.
    """
    if output and Path(output).exists() and not Path(output).is_dir():
        raise CareHubError(f"'{output}' is not a folder.")
    accelerator = start()
    subjects = [Subject.open(name, accelerator.device) for name in names]
    sizes = sorted({s.encoder.care["image_size"] for s in subjects})
    if len(sizes) > 1:
        raise CareHubError(f"encoders of {' and '.join(map(str, sizes))} px see different pictures and can't be compared.")
    if bare := [s.name for s in subjects if s.encoder.projection is None]:
        raise CareHubError(f"'{bare[0]}' has no projection head, so there is no sphere on which rotations could act.")
    train, test = load(subjects[0].encoder, dataset, data_root, accelerator, **options)
    train, test = train.take(some_of(len(train), 5000)), test.take(some_of(len(test), images))
    pictures = sources.center(test.held, sizes[0])
    if len(pictures) < 4:
        raise CareHubError(f"'{dataset}' has {len(pictures)} test pictures, too few to fit and measure rotations.")
    recipe, answer = recipe_of(subjects[0].encoder), {}
    for subject in subjects:
        families = geometry(subject.encoder, pictures, recipe, draws, seed, progress=sys.stderr.isatty())
        results = {"images": len(pictures), "draws": draws, "seed": seed, "families": families}
        results |= {"effective_rank": measures.effective_rank(torch.from_numpy(subject.encoder.encode(pictures)))}
        results["kept"] = kept(subject.encoder, train, test, seed)
        answer[subject.name] = rounded(results)
        if subject.ours:
            figures.geometry({subject.name: answer[subject.name]}, subject.folder / f"equivariance.{dataset.replace('/', '--')}.png")
            record.add(subject.folder, "equivariance", dataset, answer[subject.name])
    if output:
        Path(output).mkdir(parents=True, exist_ok=True)
        (Path(output) / "equivariance.json").write_text(json.dumps({"dataset": dataset, "encoders": answer}, indent=2) + "\n")
        figures.geometry(answer, Path(output) / "equivariance.png")
        figures.neighbours({s.name: s.encoder for s in subjects}, test, Path(output) / "neighbours.png")
    return answer


def rounded(value):
    """Numbers to five digits, in whatever they are nested in; None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if value == value else None
    return value

"""The model card: README.md of an export, written from what the folder contains.

Only the part between two markers and the metadata that care_hub knows are replaced; what users
wrote stays.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..config import EncoderConfig, plain_values
from ..data.sources import SPECS
from ..errors import CareHubError, printable
from ..files import own_file, write_text
from ..metrics import FINAL_GEOMETRY, METRICS
from ..models import SMALL
from .evaluation_record import Record, read_record
from .export import folder_lock, read_config
from .linear_head import LinearHead, read_heads
from .markdown import render
from .rotation_set import RotationSet, read_rotations

BEGIN, END = "<!-- written by care_hub: begin -->", "<!-- written by care_hub: end -->"
README_BYTES = 1 << 20
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[-+]\d+)?")
OURS = re.compile(f"{BEGIN}.*?{END}", re.DOTALL)
TAGS = ["care_hub", "timm", "equivariance", "self-supervised-learning", "contrastive-learning"]
LICENSES = ("mit", "apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0")  # the Hub refuses unknown ones
# Where it is known which one results are of: others have a test or a validation split.
TEST_SPLITS = dict.fromkeys(("shapes", "cifar10", "cifar100", "stl10"), "test")
TEST_SPLITS["imagenet100"] = "validation"
ROTATION_METRICS = (
    "motion",
    "same_image_hit_at_1",
    "same_image_hit_at_1_linear",
    "cosine",
    "cosine_unrotated",
)
FAMILY_METRICS = (
    "motion",
    "same_image_hit_at_1",
    "rotation_invariance_ratio",
    "gram_deviation",
    "hit_at_1",
    "hit_at_1_unrotated",
)


def write_card(folder: Path, name: str | None = None) -> Path:
    """Write the README.md of the export in `folder`, see `card_text`; returns its path."""
    path = folder / "README.md"
    with folder_lock(folder):
        write_text(path, card_text(folder, name))
    return path


def card_text(folder: Path, name: str | None = None, before: str | None = None) -> str:
    """The card of the export in `folder`.

    `name`: the Hub id or registry name under which the encoder will be found, by default the folder
    itself. `before`: the text of the card that this one replaces elsewhere, on the Hub. What users
    wrote into it and into the card in `folder` stays. Raises CareHubError for a folder whose files
    can't be read.
    """
    local = _read_card(folder / "README.md")
    text = _merged(before or local, *_written(folder, name))
    if before and local:
        theirs = "\n\n".join(part.strip() for part in _split(local)[1])
        missing = [part for part in theirs.split("\n\n") if part.strip() not in text]
        text = "\n\n".join([text.rstrip(), *missing]) + "\n"
    return text


def _merged(before: str | None, data: ModelCardData, body: str) -> str:
    """A card with `data` and `body` in place of those in `before`, of which the rest stays."""
    values, content = data.to_dict(), f"{BEGIN}\n{body}\n{END}"
    if before:
        theirs, parts = _split(before)
        tags = [*TAGS, *(tag for tag in theirs.get("tags") or [] if tag not in TAGS)]
        license = theirs.get("license", data.license)  # the user's to choose
        values = theirs | values | {"tags": tags, "license": license}
        content = content.join(parts) if len(parts) > 1 else f"{parts[0]}\n\n{content}".lstrip()
    return f"---\n{ModelCardData(**values, ignore_metadata_errors=True).to_yaml()}\n---\n\n{content}\n"


def card_license(folder: Path) -> str:
    """The license that the card in `folder` names, if it does. Raises CareHubError where it can't be read."""
    text = _read_card(folder / "README.md")
    return str(_split(text)[0].get("license") or "") if text else ""


def _read_card(path: Path) -> str | None:
    if not own_file(path):
        return None
    if path.stat().st_size > README_BYTES:
        raise CareHubError(f"'{path}' is too long for a card; shorten it.")
    return path.read_text(encoding="utf-8", errors="replace")


def _split(text: str) -> tuple[dict[str, Any], list[str]]:
    """A card's metadata, and its text before and after the markers: one text where there are none.

    All of `text` is text where the metadata is not valid YAML.
    """
    values: dict[str, Any] = {}
    with suppress(ValueError, TypeError, yaml.YAMLError):
        card = ModelCard(text, ignore_metadata_errors=True)
        values, text = card.data.to_dict(), card.text
    return values, OURS.split(text.strip(), maxsplit=1)


class Row(NamedTuple):
    """An accuracy in percent."""

    dataset: str
    title: str
    value: float
    note: str = ""  # what else a reader should know of it


def accuracies(config: EncoderConfig, heads: list[LinearHead], record: Record) -> list[Row]:
    """Accuracies that evaluation commands recorded, else those of heads and of the end of training.

    Their order does not depend on when they were measured: the data set of the training comes
    first, and of each data set kNN.
    """
    trained, recorded = config.dataset or "unknown", record.get("accuracy", {})
    found = {
        (trained, label): {"top1": config.results[key]}
        for key, label in (("knn_top1", "kNN"), ("knn_color_top1", "kNN, color"))
        if key in config.results
    }
    for head in heads:
        if head.dataset not in recorded and head.metrics.get("protocol") != "finetune":
            found[head.dataset, "linear probe"] = head.metrics
    for dataset, by_label in recorded.items():
        found |= {(dataset, label): metrics for label, metrics in by_label.items()}
    order = sorted(found, key=lambda at: (at[0] != trained, at[0], not at[1].startswith("kNN"), at[1]))
    return [row for at in order for row in _rows(*at, found[at])]


def _rows(dataset: str, label: str, metrics: dict[str, Any]) -> list[Row]:
    """Top-1 and top-5 of one evaluation, as far as they were measured."""
    space = "" if label.startswith("fine-tuned") else " (backbone)"
    notes = []
    if "top1_std" in metrics and "seeds" in metrics:
        notes.append(f"± {metrics['top1_std']:.2f} over {metrics['seeds']} seeds")
    for key, name in (("n_train", "training"), ("n_test", "test")):
        if key in metrics:
            notes.append(f"{metrics[key]:,} {name} images")
    return [
        Row(dataset, f"{label} {METRICS[key].title}{space}", metrics[key], note)
        for key, note in (("top1", ", ".join(notes)), ("top5", ""))
        if key in metrics
    ]


def stale_rows(folder: Path) -> list[str]:
    """Rows of the card in `folder` with a number that the files beside it do not give to that row.

    Rows of tables, as far as care_hub wrote them, and of the results that are listed for the Hub.
    Raises CareHubError for files that can't be read.
    """
    text = _read_card(folder / "README.md")
    if text is None or (ours := OURS.search(text)) is None:
        return []
    data, body = _written(folder, None)
    known = _numbered(data.to_dict(), body)
    return [
        row
        for words, numbers, row in _numbered(_split(text)[0], ours[0])
        if not any(words == other and numbers <= theirs for other, theirs, _ in known)
    ]


def _numbered(values: dict[str, Any], body: str) -> list[tuple[list[str], set[float], str]]:
    """The rows of a card's tables and metadata: the words of the first two cells, all numbers, the row."""
    lines = [line for line in body.splitlines() if line.startswith("|")]
    for result in (result for entry in values.get("model-index", []) for result in entry["results"]):
        about = f"| {result['dataset']['name']} | {{name}} | {{value}} |"
        lines += [about.format(**metric) for metric in result["metrics"]]
    words = [[NUMBER.sub("", cell).strip() for cell in line.split("|")[1:3]] for line in lines]
    numbers = [{float(text.replace(",", "")) for text in NUMBER.findall(line)} for line in lines]
    return list(zip(words, numbers, lines, strict=True))


def _written(folder: Path, name: str | None) -> tuple[ModelCardData, str]:
    """What care_hub writes: the metadata, and the part between the markers (card.md, filled in)."""
    config, _ = read_config(folder)
    heads, record, rotations = read_heads(folder), read_record(folder), read_rotations(folder)
    rows, data = accuracies(config, heads, record), stated_data(config, heads, record, rotations)
    parts = (config.model, config.method or "CARE", config.dataset or "unknown")
    title = name.split("/")[-1] if name else "-".join(parts).replace("/", "-")
    measured = record.get("equivariance", {})
    text = render(
        "card.md",
        config=config,
        name=name,
        folder=folder,
        title=title,
        stem=config.model in SMALL,
        figures=sorted(folder.glob("*.png")),
        heads=heads,
        rows=rows,
        final=[METRICS[key] for key in FINAL_GEOMETRY if key in config.results],
        family_metrics=FAMILY_METRICS,
        families={name: measured[name] for name in sorted(measured, key=lambda k: (k != config.dataset, k))},
        metrics=METRICS,
        rotations=rotations,
        data={label: public_name(label, options) for label, options in data.items()},
        rotation_metrics=ROTATION_METRICS,
        settings=plain_values(config.training),
    )
    return _metadata(config, title, rows), text


def _metadata(config: EncoderConfig, title: str, rows: list[Row]) -> ModelCardData:
    """The YAML block: what the Hub shows, filters by and lists as results."""
    trained = _hub_id(config.dataset)
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=printable(_hub_id(row.dataset) or row.dataset),
            dataset_name=printable(row.dataset),
            dataset_split=TEST_SPLITS.get(row.dataset),
            metric_type="accuracy",
            metric_name=printable(row.title),
            metric_value=float(row.value),
        )
        for row in rows
    ]
    license = config.init.get("license", "other") if config.init else "mit"
    return ModelCardData(
        license=license if license in LICENSES else "other",
        library_name="care_hub",
        pipeline_tag="image-feature-extraction",
        datasets=[printable(trained)] if trained else None,
        tags=TAGS,
        model_name=printable(title),
        eval_results=results or None,
    )


def stated_data(
    config: EncoderConfig, heads: list[LinearHead], record: Record, rotations: RotationSet | None
) -> dict[str, dict[str, Any]]:
    """Every data set on which there are figures -> what `data.sources.data_of` takes to read it again."""
    found = {config.dataset: dict(config.training)} if config.dataset else {}
    measured = [(head.dataset, head.metrics) for head in heads]
    for dataset, by_label in record.get("accuracy", {}).items():
        measured += [(dataset, metrics) for metrics in by_label.values()]
    measured += record.get("equivariance", {}).items()
    for dataset, values in measured:
        found[dataset] = found.get(dataset, {}) | values.get("data", {})
    for fitted in rotations.fitted.values() if rotations else ():
        found[fitted.dataset] = found.get(fitted.dataset, {}) | fitted.data
    return found


def public_name(dataset: str, options: dict[str, Any]) -> str | None:
    """What gives everyone the data set that a card calls `dataset`: its id on the Hub, or "shapes".

    `options`: as of `stated_data`. None for one that is not known to be public.
    """
    name = str(options.get("dataset_name", dataset))
    return name if name == "shapes" else _hub_id(name)


def _hub_id(dataset: str | None) -> str | None:
    """Where a data set is on the Hub."""
    if dataset in SPECS:
        return SPECS[dataset].hub_id
    return dataset if dataset and re.fullmatch(r"[\w.-]+/[\w.-]+", dataset, re.ASCII) else None

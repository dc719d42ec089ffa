"""The model card: README.md of an export, written from what the folder contains.

Only the part between two markers and the metadata that care_hub knows are replaced; what users wrote stays.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment

from ..config import EncoderConfig, plain_values
from ..data.sources import SPECS
from ..metrics import FINAL_METRICS, METRICS
from ..models import SMALL
from .evaluation_record import Record, read_record
from .export import folder_lock, read_config, write_text
from .linear_head import LinearHead, head_files

BEGIN, END = "<!-- written by care_hub: begin -->", "<!-- written by care_hub: end -->"
TAGS = ["care_hub", "timm", "equivariance", "self-supervised-learning", "contrastive-learning"]
FAMILY_METRICS = ("rotation_invariance_ratio", "gram_deviation", "hit_at_1", "hit_at_1_unrotated")


def write_card(folder: Path, name: str | None = None) -> Path:
    """Write the README.md of the export in `folder`, see `card_text`; returns its path."""
    path = folder / "README.md"
    with folder_lock(folder):
        write_text(path, card_text(folder, name))
    return path


def card_text(folder: Path, name: str | None = None, before: str | None = None) -> str:
    """The card of the export in `folder`.

    `name`: the Hub id or registry name under which the encoder will be found, by default the folder itself.
    `before`: the text of the card that this one replaces elsewhere, on the Hub. What users wrote into it and
    into the card in `folder` stays. Raises CareHubError for a folder whose files can't be read.
    """
    path = folder / "README.md"
    local = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    config, _ = read_config(folder)
    heads, record = [LinearHead.load(path) for path in head_files(folder)], read_record(folder)
    rows, title = accuracies(config, heads, record), _title(config, name)
    body = _body(folder, name, title, config, heads, rows, record.get("equivariance", {}))
    text = _merged(before or local, _metadata(config, title, rows), body)
    if before and local:
        missing = [part for part in _outside(_split(local)[1]).split("\n\n") if part.strip() not in text]
        text = "\n\n".join([text.rstrip(), *missing]) + "\n"
    return text


def _merged(before: str | None, data: ModelCardData, body: str) -> str:
    """A card with `data` and `body` in place of those in `before`, of which the rest stays."""
    values, content = data.to_dict(), f"{BEGIN}\n{body}\n{END}"
    if before:
        theirs, rest = _split(before)
        tags = [*TAGS, *(tag for tag in theirs.get("tags") or [] if tag not in TAGS)]
        license = theirs.get("license", data.license)  # the user's to choose
        values = theirs | values | {"tags": tags, "license": license}
        content = _replaced(rest, content)
    return f"---\n{ModelCardData(**values, ignore_metadata_errors=True).to_yaml()}\n---\n\n{content}\n"


def _split(text: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text; text alone, all of it, where the metadata is not valid YAML."""
    try:
        card = ModelCard(text, ignore_metadata_errors=True)
        return card.data.to_dict(), card.text.strip()
    except (ValueError, TypeError, yaml.YAMLError):
        return {}, text.strip()


def _marked(text: str) -> tuple[int, int] | None:
    """Where the part between the markers, with them, begins and ends; None where there is none."""
    start, stop = text.find(BEGIN), text.find(END)
    return (start, stop + len(END)) if 0 <= start < stop else None


def _outside(text: str) -> str:
    """What is not between the markers."""
    if place := _marked(text):
        return text[: place[0]].rstrip() + "\n\n" + text[place[1] :].lstrip()
    return text


def _replaced(text: str, ours: str) -> str:
    """`text` with `ours` in place of the part between the markers; at the end where there are none."""
    if place := _marked(text):
        return text[: place[0]] + ours + text[place[1] :]
    return f"{text}\n\n{ours}" if text else ours


class Row(NamedTuple):
    """An accuracy in per cent."""

    dataset: str
    title: str
    value: float
    note: str = ""  # what else a reader should know of it


def accuracies(config: EncoderConfig, heads: list[LinearHead], record: Record) -> list[Row]:
    """Accuracies that evaluation commands recorded, else those of the heads and of the end of training.

    Their order does not depend on when they were measured: the data set of the training comes first, and of
    each data set kNN.
    """
    trained, recorded = config.dataset or "unknown", record.get("accuracy", {})
    found: dict[str, dict[str, dict[str, Any]]] = {trained: {}}
    for key, label in (("knn_top1", "kNN"), ("knn_color_top1", "kNN, color")):
        if key in config.results:
            found[trained][label] = {"top1": config.results[key]}
    for head in heads:
        if head.dataset not in recorded and head.metrics.get("protocol") != "finetune":
            found.setdefault(head.dataset, {})["linear probe"] = head.metrics
    for dataset, by_label in recorded.items():
        found.setdefault(dataset, {}).update(by_label)
    rows = []
    for dataset in sorted(found, key=lambda dataset: (dataset != trained, dataset)):
        for label in sorted(found[dataset], key=lambda label: (not label.startswith("kNN"), label)):
            rows += _rows(dataset, label, found[dataset][label])
    return rows


def _rows(dataset: str, label: str, metrics: dict[str, Any]) -> list[Row]:
    """Top-1 and top-5 of one evaluation, as far as they were measured."""
    space = "" if label.startswith("fine-tuned") else " (backbone)"
    notes = []
    if "top1_std" in metrics and "seeds" in metrics:
        notes.append(f"± {metrics['top1_std']:.2f} over {metrics['seeds']} seeds")
    if "n_train" in metrics:
        notes.append(f"{metrics['n_train']:,} training images")
    note = {"top1": ", ".join(notes)}
    return [
        Row(dataset, f"{label} {METRICS[key].title}{space}", metrics[key], note.get(key, ""))
        for key in ("top1", "top5")
        if key in metrics
    ]


def _title(config: EncoderConfig, name: str | None) -> str:
    parts = (config.model, config.method or "CARE", config.dataset or "unknown")
    return name.split("/")[-1] if name else "-".join(parts).replace("/", "-")


def _metadata(config: EncoderConfig, title: str, rows: list[Row]) -> ModelCardData:
    """The YAML block: what the Hub shows, filters by and lists as results."""
    trained = _hub_id(config.dataset)
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=_hub_id(row.dataset) or row.dataset,
            dataset_name=row.dataset,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=row.title,
            metric_value=float(row.value),
        )
        for row in rows
    ]
    return ModelCardData(
        license="mit",
        library_name="care_hub",
        pipeline_tag="image-feature-extraction",
        datasets=[trained] if trained else None,
        tags=TAGS,
        model_name=title,
        eval_results=results or None,
    )


def _hub_id(dataset: str | None) -> str | None:
    """Where a data set is on the Hub."""
    if dataset in SPECS:
        return SPECS[dataset].hub_id
    return dataset if dataset and "/" in dataset else None


def _body(
    folder: Path,
    name: str | None,
    title: str,
    config: EncoderConfig,
    heads: list[LinearHead],
    rows: list[Row],
    equivariance: dict[str, dict[str, Any]],
) -> str:
    """The part between the markers: card.md, filled in."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|")
    template = environment.from_string((Path(__file__).parent / "card.md").read_text(encoding="utf-8"))
    source, final = name or str(folder), [METRICS[key] for key in FINAL_METRICS if key in config.results]
    text = template.render(
        config=config,
        title=title,
        source=source,
        timm_finds_it=name is None or "/" in name,  # unlike a name in our registry
        timm_source=f"hf-hub:{name}" if name else f"local-dir:{folder}",
        stem=config.model in SMALL,
        figures=sorted(folder.glob("*.png")),
        heads=heads,
        rows=[(row.dataset, row.title, f"{row.value:.2f}", row.note) for row in rows],
        final=[(m.title, f"{config.results[m.key]:.4f}", m.meaning) for m in final if m.unit != "%"],
        families={dataset: _families(found) for dataset, found in equivariance.items()},
        settings=yaml.safe_dump(plain_values(config.training), sort_keys=False).strip()
        if config.training
        else "",
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _families(found: dict[str, Any]) -> dict[str, Any]:
    """What `care-hub equivariance` measured, as cells: a row per family, and a row per attribute."""
    families, spaces = found["families"], found["attributes"]
    return {
        "images": found["images"],
        "draws": found["draws"],
        "head": ["augmentation", *(_with_unit(METRICS[key].title, key, ", ") for key in FAMILY_METRICS)],
        "rows": [
            [name, *(_interval(of.get(key)) for key in FAMILY_METRICS)] for name, of in families.items()
        ],
        "spaces": ["", *spaces],
        "attributes": [
            [name, *(_with_unit(f"{values[name]:.3g}", name) for values in spaces.values())]
            for name in next(iter(spaces.values()))
        ],
    }


def _interval(interval: list[float | None] | None) -> str:
    """A mean with its 95 % interval, "-" where it was not measured."""
    if interval is None or interval[0] is None:
        return "-"
    mean, low, high = interval
    return f"{mean:.3g} ({low:.3g} to {high:.3g})"


def _with_unit(text: str, key: str, between: str = " ") -> str:
    """`text` about the metric `key` with "%", if it is in per cent."""
    return f"{text}{between}%" if key in METRICS and METRICS[key].unit == "%" else text

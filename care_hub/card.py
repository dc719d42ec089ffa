"""The model card: README.md of an export, written from what the folder holds.

Only the part between two markers, and the metadata that we know, are ours; whatever else a person wrote stays.
"""

import json
from pathlib import Path
from typing import NamedTuple

from .classifier import LinearHead, heads
from .data.sources import SPECS
from .evaluate import record
from .models import SMALL
from .report import MEASURES

BEGIN, END = "<!-- written by care_hub: begin -->", "<!-- written by care_hub: end -->"
PAPER = "https://arxiv.org/abs/2306.13924"


def write(folder: Path, name: str | None = None, before: str | None = None) -> Path:
    """Write `folder`/README.md. `name`: the Hub id or registry name under which it will be found. `before`: the text of the
    card that it replaces elsewhere, on the Hub; what a person added to the one in the folder is kept too."""
    path = folder / "README.md"
    local = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    text = merge(before or local, *_written(folder, name))
    if before and local:
        kept = [part for part in _outside(_split(local)[1]).split("\n\n") if part.strip() not in text]
        text = "\n\n".join([text.rstrip(), *kept]) + "\n"
    path.write_text(text, encoding="utf-8")
    return path


def merge(before: str | None, data, text: str) -> str:
    """A card with `data` (huggingface_hub.ModelCardData) and `text` in place of ours in `before`; the rest of it stays."""
    from huggingface_hub import ModelCardData

    ours = f"{BEGIN}\n{text}\n{END}"
    values, content = data.to_dict(), ours
    if before:
        theirs, rest = _split(before)
        values = theirs | values | {"tags": sorted({*(theirs.get("tags") or []), *values["tags"]})}
        values["license"] = theirs.get("license", data.license)  # a person's to choose
        start, stop = rest.find(BEGIN), rest.find(END)
        content = rest[:start] + ours + rest[stop + len(END) :] if 0 <= start < stop else f"{rest}\n\n{ours}" if rest else ours
    return f"---\n{ModelCardData(**values, ignore_metadata_errors=True).to_yaml()}\n---\n\n{content}\n"


def _split(text: str) -> tuple[dict, str]:
    """A card's metadata and its text; text alone where the metadata is not valid (it is the person's, and stays)."""
    import yaml
    from huggingface_hub import ModelCard

    try:
        old = ModelCard(text, ignore_metadata_errors=True)
        return old.data.to_dict(), old.text.strip()
    except (ValueError, TypeError, yaml.YAMLError):
        return {}, text.strip()


def _outside(text: str) -> str:
    """What is not between our markers."""
    start, stop = text.find(BEGIN), text.find(END)
    return text[:start].rstrip() + "\n\n" + text[stop + len(END) :].lstrip() if 0 <= start < stop else text


def _written(folder: Path, name: str | None):
    """(metadata, text) of the card for the export in `folder`."""
    care = json.loads((folder / "config.json").read_text())["care"]
    linear, measured = [LinearHead.load(path) for path in heads(folder)], record.read(folder)
    rows = accuracies(care, linear, measured)
    return metadata(care, rows, name), body(folder, care, linear, rows, measured.get("equivariance", {}), name)


def metadata(care: dict, rows: list["Row"], name: str | None):
    """The YAML block: what the Hub shows, filters by and lists as results."""
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    for row in rows:
        about = SPECS.get(row.dataset)
        results.append(
            EvalResult(
                task_type="image-classification", dataset_type=(about.hub_id if about and about.hub_id else row.dataset),
                dataset_name=row.dataset, dataset_split="test",
                metric_type="accuracy", metric_name=row.title, metric_value=float(row.value),
            )
        )  # fmt: skip
    trained = care.get("dataset", "")
    hub_id = SPECS[trained].hub_id if trained in SPECS else trained if "/" in trained else None
    return ModelCardData(
        license="mit", library_name="care_hub", pipeline_tag="image-feature-extraction", datasets=[hub_id] if hub_id else None,
        tags=["care_hub", "timm", "equivariance", "self-supervised-learning", "contrastive-learning"],
        model_name=(name or "").split("/")[-1] or _title(care), eval_results=results or None,
    )  # fmt: skip


class Row(NamedTuple):
    """An accuracy in per cent."""

    dataset: str
    title: str
    value: float
    note: str = ""  # what else a reader should know of it


def accuracies(care: dict, linear: list[LinearHead], measured: dict) -> list[Row]:
    """All that was measured: by evaluation commands (`measured`: evaluation.json), else at the end of training."""
    known, rows = measured.get("accuracy", {}), []
    results, trained = care.get("results", {}), care.get("dataset")
    if "knn_top1" in results and "kNN" not in known.get(trained, {}):
        rows.append(Row(trained, "kNN top-1 (backbone)", results["knn_top1"]))
    if "knn_color_top1" in results:
        rows.append(Row(trained, "kNN top-1, colour (backbone)", results["knn_color_top1"]))
    known = {head.dataset: {"linear probe": head.metrics} for head in linear if head.metrics.get("protocol") != "finetune"} | known
    for dataset, by_label in known.items():
        for label, metrics in by_label.items():
            note = f"± {metrics['top1_std']:.2f} over {metrics['seeds']} seeds, " if "top1_std" in metrics else ""
            note += f"{metrics['n_train']:,} training pictures" if "n_train" in metrics else ""
            where = "" if label.startswith("fine-tuned") else " (backbone)"
            rows += [
                Row(dataset, f"{label} top-{k}{where}", metrics[f"top{k}"], note if k == 1 else "") for k in (1, 5) if f"top{k}" in metrics
            ]
    return sorted(rows, key=lambda row: (row.dataset != trained, row.dataset, not row.title.startswith("kNN")))


def body(folder: Path, care: dict, linear: list[LinearHead], rows: list[Row], geometry: dict, name: str | None) -> str:
    """The part between the markers."""
    source, stem, size = name or str(folder), SMALL.get(care["model"]), care["image_size"]
    head = care.get("projection")
    parts = [f"# {(name or '').split('/')[-1] or _title(care)}", _what(care)]
    parts += [f"![{picture.stem}]({picture.name})" for picture in sorted(folder.glob("*.png"))]
    parts += ["## Use", _ours(source, head, linear)]
    if name is None or "/" in name:
        parts += ["Without care_hub, in plain timm:", _timm(source, bool(name), stem, size)]
    if rows:
        lines = [[row.dataset, row.title, f"{row.value:.2f}", row.note] for row in rows]
        parts += ["## Results", _table([["data set", "measure", "%", ""], *lines])]
    known = care.get("results", {})
    closing = [[title, f"{known[key]:.4f}", text] for key, title, text in MEASURES if key in known and "knn" not in key]
    if closing or geometry:
        parts += [
            "## Equivariance",
            "On held-out pictures, in projection space; one orthogonal R fitted on one half, measured on the other.",
        ]
    if closing:
        parts += [_table([["measure", "value", "meaning"], *closing])]
    for dataset, result in geometry.items():
        parts += _geometry(dataset, result)
    if training := care.get("training"):
        import yaml

        settings = yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in training.items()}, sort_keys=False).strip()
        parts += ["## Training", "Settings, as a file for `train.py --config`:", f"```yaml\n{settings}\n```"]
    if versions := care.get("versions"):
        parts += ["## Environment", ", ".join(f"{k} {v}" for k, v in versions.items())]
    parts += [
        "## Limits",
        f"Trained on pictures of {size} px; larger ones are shrunk to that. Augmentations that destroy content (hard crops, greyscale) are "
        "rotations only roughly. No study of bias or robustness was made.",
        "## Citation",
        f"Gupta, Robinson, Lim, Villar, Jegelka: Structuring Representation Geometry with Rotationally Equivariant Contrastive Learning, "
        f"ICLR 2024 ({PAPER}). Trained with care_hub, an independent implementation. MIT licence.",
    ]
    return "\n\n".join(parts)


def _what(care: dict) -> str:
    """One or two sentences."""
    trained, tuned, weight = care.get("dataset"), care.get("finetuned"), care.get("weight")
    what = f"An image encoder ({care['model']}, {care['image_size']} px) trained without labels" + (f" on `{trained}`" if trained else "")
    what += f" by {care.get('method', 'CARE')}" + (f" (equivariance weight {weight:g})" if weight else "")
    if tuned:
        return f"{what}, then fine-tuned with the labels of `{tuned}`. Its embeddings are no longer meant to rotate."
    if weight or weight is None:
        return f"{what}. In its embedding space an augmentation acts, as far as training reached, as a rotation of the unit sphere."
    return f"{what}. It is a plain baseline: nothing in its training asked augmentations to act as rotations."


def _geometry(dataset: str, result: dict) -> list[str]:
    """What `care-hub equivariance` measured."""

    def cell(family: dict, measure: str) -> str:
        mean, low, high = family.get(measure) or (None,) * 3
        return "-" if mean is None else f"{mean:.3g} ({low:.3g} to {high:.3g})"

    shown = {
        "rotation_invariance_ratio": "rotation error / invariance error", "gram_deviation": "Gram deviation",
        "hit_at_1": "found by R f(x), %", "hit_at_1_unrotated": "found by f(x), %",
    }  # fmt: skip
    rows = [[name, *(cell(family, measure) for measure in shown)] for name, family in result["families"].items()]
    note = f"By augmentation on `{dataset}`, with 95 % intervals ({result['images']:,} pictures, {result['draws']} draws):"
    kept = result["kept"]
    read = [
        [name, *(f"{space[name]:.3g}" + (" %" if name in ("label", "color") else "") for space in kept.values())]
        for name in kept["backbone"]
    ]
    return [
        note, _table([["augmentation", *shown.values()], *rows]),
        "What a linear map reads from the embeddings (accuracy in %, R² of numbers):", _table([["", *kept], *read]),
    ]  # fmt: skip


def _table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _title(care: dict) -> str:
    return f"{care['model']}-{care.get('method', 'CARE')}-{care.get('dataset', 'unknown')}".replace("/", "-")


def _ours(source: str, head: dict | None, linear: list[LinearHead]) -> str:
    lines = [
        "import care_hub",
        "from PIL import Image",
        "",
        'pictures = [Image.radial_gradient("L").convert("RGB")]  # yours: paths, a folder, ...',
    ]
    lines += [f'encoder = care_hub.load_encoder("{source}")']
    if head:
        lines += [f"z = encoder.encode(pictures)  # (N, {head['outputs']}) unit vectors that rotate"]
    lines += ['h = encoder.encode(pictures, space="backbone")  # raw features, for probes']
    if linear:
        lines += [f'labels, probabilities = care_hub.load_classifier("{source}", dataset="{linear[0].dataset}").classify(pictures)']
    return "```python\n" + "\n".join(lines) + "\n```"


def _timm(source: str, on_hub: bool, stem, size: int) -> str:
    lines = ["import timm", "import torch", "from PIL import Image"]
    lines += ["from torchvision.transforms.functional import InterpolationMode, center_crop, resize"] if stem else []
    lines += ["", f'model = timm.create_model("{"hf-hub" if on_hub else "local-dir"}:{source}", pretrained=True).eval()']
    lines += ["transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))"]
    lines += ['picture = Image.radial_gradient("L").convert("RGB")  # yours']
    if stem:
        lines += [f"picture = center_crop(resize(picture, {size}, InterpolationMode.BICUBIC), {size})  # to its own size, antialiased"]
    lines += ["with torch.no_grad():", "    features = model(transform(picture)[None])"]
    return "```python\n" + "\n".join(lines) + "\n```"

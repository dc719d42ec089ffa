"""The model card: README.md of an export, written from what the folder holds.

Only the part between two markers, and the metadata that we know, are ours; whatever else a person wrote stays.
"""

import json
from pathlib import Path

from .classifier import LinearHead, heads
from .data.sources import SPECS
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
    linear = [LinearHead.load(path) for path in heads(folder)]
    return metadata(care, linear, name), body(folder, care, linear, name)


def metadata(care: dict, linear: list[LinearHead], name: str | None):
    """The YAML block: what the Hub shows, filters by and lists as results."""
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    for dataset, title, value in accuracies(care, linear):
        about = SPECS.get(dataset)
        results.append(
            EvalResult(
                task_type="image-classification", dataset_type=(about.hub_id if about and about.hub_id else dataset), dataset_name=dataset,
                dataset_split="test", metric_type="accuracy", metric_name=f"{title} (backbone)", metric_value=float(value),
            )
        )  # fmt: skip
    trained = care.get("dataset", "")
    hub_id = SPECS[trained].hub_id if trained in SPECS else trained if "/" in trained else None
    return ModelCardData(
        license="mit", library_name="care_hub", pipeline_tag="image-feature-extraction", datasets=[hub_id] if hub_id else None,
        tags=["care_hub", "timm", "equivariance", "self-supervised-learning", "contrastive-learning"],
        model_name=(name or "").split("/")[-1] or _title(care), eval_results=results or None,
    )  # fmt: skip


def accuracies(care: dict, linear: list[LinearHead]) -> list[tuple[str, str, float]]:
    """(data set, metric, per cent) of all that was measured on backbone features."""
    results, rows = care.get("results", {}), []
    for key, title in (("knn_top1", "kNN top-1"), ("knn_color_top1", "kNN top-1, colour")):
        if key in results:
            rows.append((care["dataset"], title, results[key]))
    for head in linear:
        rows += [(head.dataset, f"linear probe top-{k}", head.metrics[f"top{k}"]) for k in (1, 5) if f"top{k}" in head.metrics]
    return rows


def body(folder: Path, care: dict, linear: list[LinearHead], name: str | None) -> str:
    """The part between the markers."""
    source, stem, size = name or str(folder), SMALL.get(care["model"]), care["image_size"]
    head, trained, weight = care.get("projection"), care.get("dataset"), care.get("weight")
    learned = f"trained without labels on `{trained}`" if trained else "trained without labels"
    what = (
        f"An image encoder ({care['model']}, {size} px) {learned} by {care.get('method', 'CARE')}"
        + (f" (equivariance weight {weight:g}). " if weight else ". ")
        + "In its embedding space an augmentation of the picture acts, as far as training reached, as a rotation of the unit sphere."
        if weight or weight is None
        else f"An image encoder ({care['model']}, {size} px) {learned} by {care['method']}. It is a plain baseline: "
        "nothing in its training asked augmentations to act as rotations."
    )
    parts = [f"# {(name or '').split('/')[-1] or _title(care)}", what]
    parts += [f"![{picture.stem}]({picture.name})" for picture in sorted(folder.glob("*.png"))]
    parts += ["## Use", _ours(source, head, linear)]
    if name is None or "/" in name:
        parts += ["Without care_hub, in plain timm:", _timm(source, bool(name), stem, size)]
    if rows := accuracies(care, linear):
        table = [f"| {d} | {title} | {value:.2f} |" for d, title, value in rows]
        parts += ["## Results", "\n".join(["| data set | measure (backbone features) | % |", "|---|---|---|", *table])]
    known = care.get("results", {})
    geometry = [(title, known[key], text.replace("|", "\\|")) for key, title, text in MEASURES if key in known and "knn" not in key]
    if geometry:
        rows = [f"| {title} | {value:.4f} | {text} |" for title, value, text in geometry]
        note = "On held-out pictures, in projection space; one orthogonal R fitted on one half, measured on the other."
        parts += ["## Equivariance", note, "\n".join(["| measure | value | meaning |", "|---|---|---|", *rows])]
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

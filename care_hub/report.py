"""What a person sees before training and after it."""

import shlex
from pathlib import Path

import torch

from .config import Plan, TrainConfig, lr_at
from .encoder import Encoder


def plan(config: TrainConfig, plan: Plan, encoder: Encoder, data: dict, processes: int, where: str, precision: str) -> str:
    """The resolved plan in a few lines; with --dry-run also the learning rates and a guess of the memory."""
    million = sum(p.numel() for p in encoder.parameters()) / 1e6
    micro = f", each the average of {config.gradient_accumulation} independent micro-batches" if config.gradient_accumulation > 1 else ""
    growing = f" growing over {config.weight_warmup_epochs:g} epochs" if config.weight_warmup_epochs else ""
    groups = f", weight {config.weight:g}{growing}, {config.equiv_splits} groups" if config.weight else ""
    queue = f", queue {config.queue_for(len(data['train'])):,}" if config.method == "moco" else ""
    lines = [
        f"{config.label}{groups}{queue} · {config.model} ({million:.1f} M parameters) · {config.dataset_name}, "
        f"{len(data['train']):,} images at {encoder.care['image_size']} px",
        f"{plan.stop:,} steps of {config.batch_size} images{micro} ({plan.stop / plan.steps_per_epoch:.1f} epochs) on "
        f"{processes} x {where}",
        f"precision {precision}, channels_last, {'' if config.optimizer == 'lars' else 'fused '}{config.optimizer}"
        f"{', compiled' if config.compile else ''}, pictures {held_or_not(data['train'])}",
    ]
    for split, images in data.items():
        if images is not None and images.skipped:
            lines.append(f"skipped {len(images.skipped)} broken pictures in {split}: " + " ".join(images.skipped))
    if config.dry_run:
        marks = sorted({0, plan.warmup, plan.steps // 4, plan.steps // 2, 3 * plan.steps // 4, plan.steps - 1})
        rates = (f"{lr_at(k, plan.steps, plan.warmup, config.lr, config.lr_schedule_type):.3g} at step {k + 1:,}" for k in marks)
        share = config.batch_size // processes
        lines += [
            f"{share} images per process" + (f", {config.equiv_splits // processes} groups" if config.weight else ""),
            f"learning rate {', '.join(rates)}",
            f"about {memory_guess(config, encoder, share, precision) / 2**30:.1f} GiB per process for the step (a guess)",
        ]
    return "\n".join(lines)


def held_or_not(images) -> str:
    return "held in memory" if images.held is not None else f"decoded by {images.workers} loader processes"


def memory_guess(config: TrainConfig, encoder: Encoder, images: int, precision: str) -> float:
    """Bytes of weights, gradients, optimiser and of what the layers keep for the backward pass of one pair of views at a time
    (the outputs of all layers, measured on one picture)."""
    kept, size = [0], encoder.care["image_size"]

    def count(module, inputs, output):
        kept[0] += output.numel() if isinstance(output, torch.Tensor) else 0

    hooks = [m.register_forward_hook(count) for m in encoder.modules() if not list(m.children())]
    encoder.eval().embed(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    equivariance = 0 if not config.weight or config.views == "shared" else 2 / config.equivariance_stride
    views = images * (2 + equivariance)  # both pairs are alive when the backward pass begins
    parameters = sum(p.numel() for p in encoder.parameters())
    copies = {"adam": 4, "adamw": 4}.get(config.optimizer, 3) + (config.method == "moco")
    return parameters * 4 * copies + kept[0] * views * (4 if precision == "no" else 2)


MEASURES = (
    ("knn_top1", "kNN, label", "top-1 on held-out images, backbone features"),
    ("knn_color_top1", "kNN, color", "the same for the color"),
    ("invariance_error", "invariance error", "how far an augmentation moves an embedding: mean |f(ax) - f(x)|^2"),
    ("rotation_error", "rotation error", "what is left after one fitted rotation for all images"),
    ("rotation_invariance_ratio", "ratio of the two", "mean over 16 augmentations; 1 = rotating helps nothing"),
    ("gram_deviation", "Gram deviation", "how much an augmentation changes inner products between images"),
)


def closing_screen(config: TrainConfig, run: Path, results: dict, skipped: list[str]) -> str:
    """What was measured, where it lies, and what to type next."""
    lines = ["", f"Trained {config.label} on {config.dataset_name} in {results['training_seconds'] / 60:.1f} minutes "
                 f"({results['images_per_second']:.0f} images/s).", ""]  # fmt: skip
    for key, title, explanation in MEASURES:
        if key in results:
            value = f"{results[key]:6.1f} %" if key.startswith("knn") else f"{results[key]:8.4f}"
            lines.append(f"  {title:<18}{value:<10} {explanation}")
    if skipped:
        lines += ["", f"  {len(skipped)} broken pictures were skipped."]
    name, root = shlex.quote(str(run)), f" --data-root {shlex.quote(config.data_root)}" if config.data_root else ""
    lines += [
        "",
        f"Results    {run / 'results.json'}, {run / 'metrics.jsonl'}",
        f"Encoder    {run / 'export'}   (neighbours.png there shows what it finds alike)",
        "",
        "Next",
        f"  care-hub embed YOUR_PICTURES --encoder {name} -o embeddings.parquet",
        f"  python -c \"import care_hub; print(care_hub.load_encoder('{run}').encode('YOUR_PICTURES').shape)\"",
        f"  python eval_linear.py --encoder {name} --dataset-name {config.dataset_name}{root}   # a linear head",
    ]
    if config.weight:
        plain = shlex.quote(f"{run.name}-plain") + (" --push-to-hub ''" if config.push_to_hub else "")
        config_file = shlex.quote(str(run / "config.yaml"))
        lines += [
            f"  accelerate launch train.py --config {config_file} --weight 0 --run-name {plain}   # the plain baseline",
            f"  care-hub equivariance {name} {shlex.quote(f'{run}-plain')} --dataset-name {config.dataset_name}{root} -o compared",
        ]
    return "\n".join(lines)


GEOMETRY = (
    ("invariance_error", "invariance"),
    ("rotation_error", "rotation"),
    ("rotation_invariance_ratio", "ratio"),
    ("special_rotation_invariance_ratio", "ratio SO(d)"),
    ("gamma", "gamma"),
    ("gram_deviation", "Gram"),
    ("spread", "spread"),
    ("composition_invariance_ratio", "composed"),
    ("hit_at_1", "hit@1"),
    ("hit_at_1_unrotated", "unrotated"),
    ("hit_at_1_random", "random"),
)


def table(rows: list[list[str]]) -> str:
    """Columns under the heads in the first row: the first column flush left, numbers flush right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows)


def geometry(results: dict[str, dict]) -> str:
    """What `care-hub equivariance` prints: a line for each family and encoder, then what is kept."""
    wide = len(results) > 1
    rows = [["family", *(["encoder"] if wide else []), *(title for _, title in GEOMETRY)]]
    for family in next(iter(results.values()))["families"]:
        for name, result in results.items():
            cells = [result["families"][family].get(measure) for measure, _ in GEOMETRY]
            rows.append(
                [family, *([Path(name).name] if wide else []), *("" if c is None or c[0] is None else f"{c[0]:.4g}" for c in cells)]
            )
    notes = [
        "invariance: mean |f(ax) - f(x)|^2; rotation: mean |f(ax) - R f(x)|^2 with R fitted on other pictures; ratio: of the two",
        "(composed: R_b R_a in place of R_ba). Gram, gamma: change of inner products, of distances relative to the motion.",
        "spread: 0 = collapsed. hit@1: per cent of augmented pictures found by R f(x), by f(x) and by a random rotation of it.",
    ]
    read = [["read by a linear map", *(f"{Path(n).name}, {s}" for n, r in results.items() for s in r["kept"])]]
    names = list(next(iter(next(iter(results.values()))["kept"].values())))
    for name in names:
        unit = " %" if name in ("label", "color") else " R2"
        read.append([name + unit, *(f"{space[name]:.4g}" for r in results.values() for space in r["kept"].values())])
    return "\n".join(["", table(rows), "", *notes, "", table(read)])

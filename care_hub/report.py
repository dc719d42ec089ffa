"""What a person sees before training and after it."""

import shlex
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .config import Plan, TrainConfig, lr_at
from .data.sources import Images
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
        f"{processes} x {where}, precision {precision}",
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


def memory_guess(config: TrainConfig, encoder: Encoder, images: int, precision: str) -> float:
    """Bytes of weights, gradients, optimiser and of what the layers keep for the backward pass of one pair of views at a time
    (the outputs of all layers, measured on two pictures)."""
    kept, size = [0], encoder.care["image_size"]

    def count(module, inputs, output):
        kept[0] += output.numel() if isinstance(output, torch.Tensor) else 0

    hooks = [m.register_forward_hook(count) for m in encoder.modules() if not list(m.children())]
    encoder.eval().embed(torch.zeros(2, 3, size, size))
    for hook in hooks:
        hook.remove()
    equivariance = 0 if not config.weight or config.views == "shared" else 2 / config.equivariance_stride
    views = images * (2 + equivariance)  # both pairs are alive when the backward pass begins
    parameters = sum(p.numel() for p in encoder.parameters())
    copies = {"adam": 4, "adamw": 4}.get(config.optimizer, 3) + (config.method == "moco")
    return parameters * 4 * copies + kept[0] / 2 * views * (4 if precision == "no" else 2)


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
    name = shlex.quote(str(run))
    lines += [
        "",
        f"Results    {run / 'results.json'}, {run / 'metrics.jsonl'}",
        f"Encoder    {run / 'export'}   (neighbours.png there shows what it finds alike)",
        "",
        "Next",
        f"  care-hub embed YOUR_PICTURES --encoder {name} -o embeddings.parquet",
        f"  python -c \"import care_hub; print(care_hub.load_encoder('{run}').encode('YOUR_PICTURES').shape)\"",
    ]
    if config.weight:
        lines.append(f"  {_again(config)} --weight 0   # the plain baseline, to compare")
    return "\n".join(lines)


def _again(config: TrainConfig) -> str:
    words = ["accelerate launch train.py"]
    if config.dataset_name != TrainConfig.dataset_name:
        words.append(f"--dataset-name {config.dataset_name}")
    if config.data_root:
        words.append(f"--data-root {shlex.quote(config.data_root)}")
    return " ".join(words)


def neighbours(encoder: Encoder, images: Images, path: Path, queries: int = 8, found: int = 9) -> None:
    """A sheet of query pictures and their nearest neighbours (cosine, projection space) among the other `images`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pixels = images.held.cpu()
    size = encoder.care["image_size"]
    top = (pixels.shape[-1] - size) // 2
    pixels = pixels[..., top : top + size, top : top + size]
    found = min(found, len(pixels) - 1)
    if found < 1:
        return
    z = torch.cat([F.normalize(encoder.embed(batch), dim=1) for batch in pixels.split(500)]).cpu()
    asked = torch.linspace(0, len(z) - 1, min(queries, len(z))).long()
    similarity = z[asked] @ z.T
    similarity[torch.arange(len(asked)), asked] = -2
    near = similarity.topk(found, dim=1)
    gap, width = max(2, size // 16), size + max(2, size // 16)
    sheet = np.full((len(asked) * width + gap, (found + 1) * width + 4 * gap, 3), 255, dtype=np.uint8)
    for row, query in enumerate(asked):
        for place, index in enumerate([query, *near.indices[row]]):
            y, x = gap + row * width, gap + place * width + (3 * gap if place else 0)
            sheet[y : y + size, x : x + size] = pixels[index].permute(1, 2, 0).numpy()
    figure, axes = plt.subplots(figsize=(9, 9 * sheet.shape[0] / sheet.shape[1] + 0.6), dpi=120)
    axes.imshow(sheet, interpolation="nearest" if size < 64 else "antialiased")
    axes.set_axis_off()
    axes.set_title("query | nearest neighbours, nearest first", fontsize=11, loc="left")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)

"""What a person sees when training ends."""

import shlex
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .config import TrainConfig
from .data.sources import Images
from .encoder import Encoder

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

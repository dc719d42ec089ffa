"""One export, four loaders: how far what each of them gives is from what care_hub gives.

    python benchmarks/loaders.py

The largest difference, relative to the largest value, of random weights on images of the encoder's own size
and on larger photographs; writes the table in docs/works_with.md.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import timm
import torch
from PIL import Image
from result_tables import ROOT
from torchvision.transforms.functional import InterpolationMode, center_crop, resize

import care_hub
from care_hub.encoder import Encoder
from care_hub.files import write_text
from care_hub.models import SMALL

PAGE = ROOT / "docs" / "works_with.md"
BEGIN, END = "<!-- loaders: begin -->", "<!-- loaders: end -->"
# And their image size.
MODELS = {"resnet18": 64, "vit_tiny_patch16_224": 64, "resnet10_w32_small": 32, "resnet18_w16_cifar": 32}
LOADERS = ("timm", "AutoModel", "pipeline", "SentenceTransformer")


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise with the falling spectrum of photographs, and stripes with sharp edges."""
    random = np.random.RandomState(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)).clip(1 / width)
    waves = np.exp(2j * np.pi * random.rand(3, *frequency.shape)) / frequency
    x = np.fft.irfft2(waves, (height, width)).transpose(1, 2, 0)
    x = 127 + 50 * (x - x.mean()) / x.std()
    stripes = np.indices((height, width)).sum(axis=0) // 7 % 2
    x[height // 3 :, width // 2 :] += 60 * stripes[height // 3 :, width // 2 :, None]
    return Image.fromarray(x.clip(0, 255).astype(np.uint8))


def export(folder: Path, model: str, dtype: torch.dtype | None = None, norm: bool = True) -> Encoder:
    """An encoder in which no weight or statistic is one that could be left out, stored in `folder`."""
    torch.manual_seed(0)
    encoder = Encoder.new(model, MODELS[model], hidden=64, outputs=32, norm=norm)
    encoder.train()(torch.randn(64, 3, MODELS[model], MODELS[model]))  # moves statistics
    with torch.no_grad():
        for x in encoder.parameters():
            if x.ndim == 1:
                x += 0.2 * torch.randn(x.shape)
    encoder.eval().save_pretrained(folder, dtype)
    return care_hub.load_encoder(folder).to("cpu")


def prepared(encoder: Encoder, images: list[Image.Image]) -> list[Image.Image]:
    """What all loaders take: images as they are, for a small-image stem of its own size, as the card says."""
    size, short = encoder.config.image_size, int(encoder.config.image_size / encoder.config.crop_pct)
    if encoder.config.model not in SMALL:
        return images
    return [center_crop(resize(image, short, InterpolationMode.BICUBIC), size) for image in images]


def embeddings(folder: Path, images: list[Image.Image]) -> dict[str, np.ndarray]:
    """What each loader gives."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoImageProcessor, AutoModel, pipeline

    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=plain))
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    extract = pipeline("image-feature-extraction", model=str(folder), pool=True, device="cpu")
    with torch.no_grad():
        return {
            "timm": plain(torch.stack([transform(image) for image in images])).numpy(),
            "AutoModel": model(**processor(images, return_tensors="pt")).pooler_output.numpy(),
            "pipeline": np.array(extract(images)).squeeze(1),
            "SentenceTransformer": SentenceTransformer(str(folder), device="cpu").encode(images),
        }


def differences(encoder: Encoder, images: list[Image.Image]) -> dict[str, float]:
    """The largest difference of each loader from care_hub, relative to the largest value."""
    found, differing = embeddings(encoder.folder, prepared(encoder, images)), {}
    for loader, values in found.items():
        space = "projection" if loader == "SentenceTransformer" else "backbone"
        expected = encoder.encode(images, space=space)
        assert values.dtype != np.float16 and values.shape == expected.shape
        differing[loader] = float(np.abs(values - expected).max() / np.abs(expected).max())
    return differing


def cosine(encoder: Encoder, images: list[Image.Image]) -> float:
    """The smallest, of features by care_hub and by plain timm on images that nobody has resized."""
    found, expected = embeddings(encoder.folder, images)["timm"], encoder.encode(images, space="backbone")
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found * expected).sum(axis=1) / norms).min())


def rows() -> Iterator[str]:
    """The table, in Markdown."""
    titles = ["network", "stored as", "images, px", *LOADERS, "cosine without the resize"]
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for (model, size), dtype in itertools.product(MODELS.items(), (torch.float32, torch.float16)):
        with TemporaryDirectory() as folder:
            encoder = export(Path(folder), model, dtype)
            for shape in ((size, size), (640, 480)):
                images = [photograph(*shape, seed) for seed in range(4)]
                about = [f"`{model}`", str(dtype).removeprefix("torch."), "{} × {}".format(*shape)]
                found = [f"{value:.0e}" for value in differences(encoder, images).values()]
                yield f"| {' | '.join([*about, *found, f'{cosine(encoder, images):.4f}'])} |"


@click.command()
def main() -> None:
    table = "\n".join(rows())
    click.echo(table)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    write_text(PAGE, f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()

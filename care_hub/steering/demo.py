"""One page on which an encoder's rotations are tried out, without server and network: `care-hub demo`."""

import base64
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..augment import permutation
from ..data.decode import list_images, resize_and_center_crop, square_tensor, to_rgb
from ..distributed import inference_accelerator
from ..encoder import Encoder
from ..errors import CareHubError, printable
from ..evaluate.features import CHUNK
from ..hub.registry import locate
from ..hub.rotation_set import FittedTransformation, RotationSet, find_rotations
from ..report.sheet import jpeg
from ..report.templates import page_target, write_template
from ..rotation import planes
from ..transformations import Transformation, parse

SIDE, QUALITY = 64, 75  # of thumbnails: pixels at most, and the quality of the JPEG
ASKED = 40  # images that are truly transformed, at most,
TRUE_IMAGES = 2400  # and what these become under all transformations and strengths, at most
FIXED_POINT = 32767  # numbers from -1 to 1 have this many steps to either side, in 16 bits
Json = dict[str, Any]


def demo(source: str, images: str, output: str, limit: int = 2000) -> str:
    """`care-hub demo`: write the page `output`, with the rotations of `source`; gives a sentence about it.

    `source`: an encoder. `images`: a folder, of which at most `limit` are taken at random. Raises
    CareHubError for an encoder without rotations, images that can't be decoded, and a page that
    can't be written.
    """
    target = page_target(output)
    folder = locate(source)
    rotations = find_rotations(folder, source)
    files, names = list_images(images)
    accelerator = inference_accelerator()
    if not accelerator.is_main_process:
        return ""
    encoder = Encoder.from_folder(folder).to(accelerator.device)
    if rotations.encoder != encoder.fingerprint:
        raise CareHubError(f"the rotations of '{source}' are of other embeddings than its; fit them again.")
    if len(files) < 2:
        raise CareHubError(f"'{images}' has one image; neighbors need at least two.")
    changes = {name: change for name in rotations.steerable if (change := _true_change(rotations.find(name)))}
    each = sum(len(strengths) for _, strengths in changes.values())
    asked = max(1, min(ASKED, TRUE_IMAGES // each)) if changes else 0
    # `care-hub rotations` fits to the images that come first in this order: what is asked comes last.
    order = permutation(len(files), 0, "images").flip(0)[:limit].tolist()
    chosen = sorted(order[:asked]) + sorted(order[asked:])
    thumbnails, z, pixels = _embed(encoder, [files[k] for k in chosen], rotations.space, asked)
    truly = {name: _truth(encoder, rotations.space, pixels, *change) for name, change in changes.items()}
    data = {
        "dimensions": z.shape[1],
        "images": list(zip([printable(names[k]) for k in chosen], thumbnails, strict=True)),
        "embeddings": fixed_point(z),
        "asked": len(pixels),
        "families": [_family(rotations, name, truly.get(name)) for name in rotations],
    }
    title = rotations.encoder_name or Path(source).name
    write_template("demo.html", target, {"title": title, "data": data})
    able = ", ".join(map(printable, rotations.steerable)) or "nothing"
    size = target.stat().st_size / 1e6
    return f"the page is {printable(str(target))}: {len(chosen):,} images, steered by {able}; {size:.1f} MB"


def fixed_point(values: Tensor) -> str:
    """Numbers from -1 to 1 as base64 of 16-bit integers, little-endian.

    >>> fixed_point(torch.tensor([1.0, -1.0]))
    '/38BgA=='
    """
    return base64.b64encode((values * FIXED_POINT).round().numpy().astype("<i2").tobytes()).decode()


def _true_change(found: FittedTransformation) -> tuple[Transformation, list[float]] | None:
    """The transformation of images behind rotations, and the strengths at which it is truly applied.

    These are the fitted ones and those in the middle between two. Pairs of images give none.
    """
    try:
        transformation, _ = parse(found.name)
    except CareHubError:
        return None
    if (transformation.meaning, transformation.scale) != (found.meaning, found.scale):  # pairs of such a name
        return None
    if found.scale == "switch":
        return transformation, found.strengths
    middles = [math.sqrt(a * b) if found.scale == "log" else (a + b) / 2 for a, b in pairwise(_knots(found))]
    return transformation, sorted({*found.strengths, *(float(f"{middle:.3g}") for middle in middles)})


def _knots(found: FittedTransformation) -> list[float]:
    """The strengths between which rotations lie on a geodesic."""
    return sorted([*found.strengths, found.neutral])


def _embed(
    encoder: Encoder, files: Sequence[str], space: str, asked: int
) -> tuple[list[str], Tensor, Tensor]:
    """Thumbnails, (N, d) unit vectors, and of the first `asked` images (asked, 3, S, S) uint8."""
    size, crop_pct = encoder.config.image_size, encoder.config.crop_pct

    def decode(file: str) -> tuple[Tensor, str]:
        image = to_rgb(file)
        square = resize_and_center_crop(image, SIDE, crop_pct)
        return square_tensor(image, size, crop_pct), jpeg(square, SIDE, QUALITY)

    thumbnails: list[str] = []
    parts, first = [], torch.empty(0)
    with ThreadPoolExecutor() as pool, tqdm(total=len(files), unit="image", disable=None, leave=False) as bar:
        for start in range(0, len(files), CHUNK):
            seen, small = zip(*pool.map(decode, files[start : start + CHUNK]), strict=True)
            pixels = torch.stack(seen)
            thumbnails += small
            parts.append(F.normalize(encoder.embed(pixels, space), dim=1).cpu())
            first = first if start else pixels[:asked].clone()
            bar.update(len(small))
    return thumbnails, torch.cat(parts), first


def _truth(
    encoder: Encoder, space: str, pixels: Tensor, transformation: Transformation, strengths: list[float]
) -> Json:
    """What (Q, 3, S, S) uint8 become at K strengths: K x Q thumbnails, and embeddings (K, Q, d)."""
    views, z = [], []
    for strength in strengths:
        x = transformation(pixels.to(encoder.device).float() / 255, strength)
        z.append(F.normalize(encoder.embed(x, space), dim=1).cpu())
        arrays = (x * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        views.append([jpeg(Image.fromarray(array), SIDE, QUALITY) for array in arrays])
    return {"strengths": strengths, "embeddings": fixed_point(torch.stack(z)), "images": views}


def _family(rotations: RotationSet, name: str, truth: Json | None) -> Json:
    """What the page knows of a transformation: where it is steerable, the planes in which it turns."""
    found = rotations.find(name)
    rate = (found.overall.get("same_image_hit_at_1") or [None])[0]
    measured = "not measured" if rate is None else f"found {rate:.3g} %"
    segments = []
    if found.steerable:
        for low, high in pairwise(_knots(found)):
            a, b, angles = planes((rotations[name, low].inv() @ rotations[name, high]).matrix)
            planar = torch.stack([a, b], dim=1).permute(2, 1, 0)  # (p, 2, d)
            segments.append({"planes": fixed_point(planar), "angles": angles.tolist()})
    return {
        "name": printable(name),
        "meaning": printable(found.meaning),
        "scale": found.scale,
        "neutral": found.neutral,
        "knots": _knots(found),
        "measured": measured + (", chance 50 %" if found.candidates == 2 else ""),
        "segments": segments,
        "moved": fixed_point(rotations.moved[name].T),
        "truth": truth,
    }

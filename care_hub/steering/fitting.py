"""Rotations fitted to transformations of images on one half of them, and measured on the other."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .. import __version__, metrics
from ..augment import center_crop, permutation, seeded_generator
from ..config import DataConfig
from ..data.decode import list_images
from ..data.inputs import decode_batches
from ..data.sources import load_split, recorded_options
from ..distributed import inference_accelerator
from ..embed_folder import read_embeddings
from ..encoder import Encoder
from ..errors import CareHubError
from ..evaluate.commands import rounded, target_folder
from ..evaluate.equivariance import CANDIDATE_IMAGES, CHUNK, RESAMPLES
from ..evaluate.features import Augmentation, embed_view, random_subset
from ..files import own_file
from ..hub.card import write_card
from ..hub.export import copy_export, sha256
from ..hub.registry import locate
from ..hub.rotation_set import WEIGHTS, FittedTransformation, RotationSet
from ..report.figures import plot_rotations
from ..rotation import least_squares, procrustes
from ..transformations import TRANSFORMATIONS, Transformation, parse

logger = logging.getLogger(__name__)

PAIRS_PER_DIMENSION = 4  # fewer pairs than so many times d fit noise: see docs/rotations.md
FEWEST_IMAGES = 4
MOVED_SHARE = 0.95  # of the squared motion, in the directions that "ignore" leaves out
FIGURE = "rotations.png"
Embed = Callable[..., Tensor]  # (N, 3, S, S) uint8, and what is done to them -> (N, d) unit vectors
Fit = tuple[FittedTransformation, Tensor, Tensor]  # with (K, d, d) rotations, and (d, r) what moves
Row = dict[str, Any]  # metric -> (B,) under B weightings of the images, or an error and a motion, (B,) each


def rotations(
    source: str,
    images: str | None = None,
    data: DataConfig | None = None,
    transforms: Sequence[str] = (),
    pairs: Sequence[tuple[str, str, str]] = (),
    limit: int = 2000,
    seed: int = 0,
    output_dir: str | None = None,
) -> RotationSet | None:
    """`care-hub rotations`: fit, measure, and write rotations.safetensors beside the encoder `source`.

    `images`: a folder; or `data`, whose test split (else its training split) is taken; at most
    `limit` of them. `transforms`: as `transformations.parse` takes them, by default all there are.
    `pairs`: (name, before, after), two folders or two files of embeddings with the same names.
    Rotations of other transformations that the encoder has stay. With `output_dir` a copy of the
    encoder is made there. Returns all its rotations; None but on the main process. Raises
    CareHubError.
    """
    if images and data:
        raise CareHubError("give either `images` or `dataset_name`, not both.")
    if not images and not data and (transforms or not pairs):
        raise CareHubError("give images to fit rotations on: `images`, a folder, or `dataset_name`.")
    wanted = [parse(text) for text in transforms or (TRANSFORMATIONS if images or data else ())]
    _check_names([transformation.name for transformation, _ in wanted] + [name for name, _, _ in pairs])
    accelerator = inference_accelerator()
    if not accelerator.is_main_process:
        return None
    folder = locate(source)
    target = target_folder(source, folder, output_dir)
    encoder = Encoder.from_folder(folder).to(accelerator.device)
    space = "backbone" if encoder.projection is None else "projection"
    new = RotationSet({}, {}, encoder.fingerprint, _name(source), space, _weights(folder))
    embed = partial(_embed, encoder, space)
    if wanted:
        label = (data or DataConfig("imagefolder", images)).data_label
        about = {"source": "data set", **recorded_options(data)} if data else {"source": "folder"}
        pixels = chosen_images(encoder, data or str(images), limit, seed)
        z = embed(pixels)
        _warn_of_few(*z[: len(z) // 2].shape)
        bar = tqdm(wanted, unit="transformation", disable=None, leave=False)
        for transformation, strengths in bar:
            found, *fits = fit_transformation(embed, pixels, z, transformation, strengths, label, seed)
            new = _with(new, replace(found, **about), *fits)
    for name, *sources in pairs:
        found, *fits = _fit_pairs(encoder, space, name, sources, limit, seed)
        new = _with(new, replace(found, source="pairs"), *fits)
    if target != folder:
        copy_export(folder, target)
    together = new.add_to(target)
    plot_rotations(together, target / FIGURE)
    write_card(target)
    return together


def _check_names(names: list[str]) -> None:
    if doubled := [name for name in names if names.count(name) > 1]:
        raise CareHubError(f"'{doubled[0]}' is asked for twice; give all its strengths at once.")
    for name in names:
        if not name.strip() or len(name) > 64 or not name.isprintable():
            raise CareHubError(f"'{name}' is no name for a transformation; it has 1 to 64 letters.")


def _name(source: str) -> str:
    """What a published file may call the encoder: of a folder its own name, not the path to it."""
    return Path(source).resolve().name if os.path.isdir(source) else source


def _weights(folder: Path) -> dict[str, str]:
    return {name: sha256(folder / name) for name in WEIGHTS if own_file(folder / name)}


def _with(found: RotationSet, fitted: FittedTransformation, matrices: Tensor, moved: Tensor) -> RotationSet:
    name = fitted.name
    one = replace(found, fitted={name: fitted}, matrices={name: matrices}, moved={name: moved})
    return found.updated(one)


def _embed(encoder: Encoder, space: str, pixels: Tensor, *steps: Augmentation) -> Tensor:
    return F.normalize(embed_view(encoder, pixels, *steps, space=space), dim=1)


def chosen_images(encoder: Encoder, source: DataConfig | str, limit: int, seed: int) -> Tensor:
    """(N, 3, S, S) uint8: at most `limit` random images of a data set or a folder, as the encoder sees them.

    Of a data set those of the test split, else of the training split. Raises CareHubError.
    """
    if not isinstance(source, str):
        return _split_pixels(encoder, source, limit, seed)
    files, _ = list_images(source)
    chosen = [files[k] for k in permutation(len(files), seed, "images")[:limit].tolist()]
    return _enough(_decode(encoder, chosen), source)


def _split_pixels(encoder: Encoder, data: DataConfig, limit: int, seed: int) -> Tensor:
    size = encoder.config.image_size
    split = load_split(data, "test", size) or load_split(data, "train", size)
    assert split is not None  # there is no data set without a training split
    pixels = split.take(random_subset(len(split), limit, seed)).pixels
    return _enough(center_crop(pixels, size), data.dataset_name)


def _decode(encoder: Encoder, files: list[str]) -> Tensor:
    config = encoder.config
    batches = decode_batches(files, CHUNK, config.image_size, config.crop_pct)
    return torch.cat([pixels for pixels, _ in batches])


def _enough(images: Tensor, source: str) -> Tensor:
    if len(images) < FEWEST_IMAGES:
        few = f"has {len(images)} images, too few to fit and measure rotations"
        raise CareHubError(f"'{source}' {few}; at least {FEWEST_IMAGES} are needed.")
    return images


def _warn_of_few(pairs: int, d: int) -> None:
    if pairs < PAIRS_PER_DIMENSION * d:
        enough = f"take {2 * PAIRS_PER_DIMENSION * d:,} images or more, of which one half is for fitting"
        logger.warning("%d pairs are few for rotations in %d dimensions; %s.", pairs, d, enough)


def measure_rotations(encoder: Encoder, rotations: RotationSet, name: str, pixels: Tensor) -> Fit:
    """The rotations of the transformation `name` as they are, measured anew on `pixels`.

    These are those of `chosen_images` to which they were fitted. Raises CareHubError for a
    transformation that there is none of.
    """
    found, embed = rotations.find(name), partial(_embed, encoder, rotations.space)
    about = parse(name)[0], found.strengths, found.dataset, found.seed
    return fit_transformation(embed, pixels, embed(pixels), *about, rotations.matrices[name])


def fit_transformation(
    embed: Embed,
    pixels: Tensor,
    z: Tensor,
    transformation: Transformation,
    strengths: Sequence[float],
    dataset: str = "",
    seed: int = 0,
    fits: Tensor | None = None,
) -> Fit:
    """A transformation of K ascending strengths: how good its rotations are, these, and what it moves.

    `pixels` (N, 3, S, S) uint8, in random order, and their embeddings `z` (N, d): the first half fits,
    the second is measured. `fits` (K, d, d): rotations that there are already, which are measured.
    """
    asked = slice(len(z) // 2, len(z) // 2 + CANDIDATE_IMAGES)

    def view(images: Tensor, strength: float) -> Tensor:
        return embed(images, partial(transformation, strength=strength))

    views = torch.stack([view(pixels, strength) for strength in strengths])
    grid = {strength: view(pixels[asked], strength) for strength in transformation.grid()}
    candidates = []
    for strength, after in zip(strengths, views, strict=True):
        # The nearest of the grid makes place for the strength itself: there are 50 whatever was fitted.
        nearest = min(grid, key=lambda other: abs(other - strength))
        others = [other for key, other in grid.items() if key != nearest]
        candidates.append(torch.stack([after[asked], z[asked], *others], dim=1))
    empty = _unmeasured(transformation, list(strengths), candidates[0].shape[1], dataset, len(z))
    return _fit(empty, z, views, candidates, seed, fits)


def _unmeasured(
    transformation: Transformation, strengths: list[float], candidates: int, dataset: str, images: int
) -> FittedTransformation:
    about = (transformation.name, transformation.meaning, transformation.scale, transformation.neutral)
    return FittedTransformation(*about, strengths, [], {}, candidates, dataset, images, __version__)


def _fit(
    empty: FittedTransformation,
    z: Tensor,
    views: Tensor,
    candidates: Sequence[Tensor],
    seed: int,
    fits: Tensor | None = None,
) -> Fit:
    """Rotations of `z` (N, d) to each of `views` (K, N, d), and `empty` with their measures.

    `candidates`: for each view (M, C, d), C views of each of the first M images of the second half;
    the right one comes first. `fits`: as of `fit_transformation`.
    """
    half = len(z) // 2
    r = (
        procrustes(z[:half].expand(len(views), -1, -1), views[:, :half], special=True)
        if fits is None
        else fits
    )
    before = z[half:]
    weights = metrics.bootstrap_weights(len(before), RESAMPLES, seeded_generator(seed, "bootstrap"))
    mean = partial(metrics.weighted_mean, weights=weights)
    distance = mean(metrics.squared_distances(before))
    rows = []
    for k, view in enumerate(views):
        maps = {"": r[k], "_linear": least_squares(z[:half], view[:half])}
        if (between := _between_neighbors(empty, r, k)) is not None:
            maps["_between"] = between
        row = _measure(before, view[half:], {name: m.to(z) for name, m in maps.items()}, candidates[k], mean)
        rows.append(row | {"motion": (mean(metrics.invariance(before, view[half:])), distance)})
    measured = [_intervals([row], seed) for row in rows]
    found = replace(empty, measured=measured, overall=_intervals(rows, seed), seed=seed)
    return found, r, _moved((views[:, :half] - z[:half]).flatten(0, 1))


def _moved(displacements: Tensor) -> Tensor:
    """(d, r) orthonormal: the fewest directions with most of the squared length of (M, d) displacements."""
    gram = displacements.double().T @ displacements.double()
    energy, directions = torch.linalg.eigh(gram)  # ascending
    share = energy.flip(0).cumsum(0) / energy.sum().clamp(min=metrics.TINY)
    return directions.flip(1)[:, : int((share < MOVED_SHARE).sum()) + 1].to(displacements)


def _between_neighbors(found: FittedTransformation, r: Tensor, k: int) -> Tensor | None:
    """What `RotationSet` would give for strength k, had it not been fitted; None for the outermost."""
    others = [j for j in range(len(r)) if j != k]
    strengths = [found.strengths[j] for j in others]
    if not others or not min(*strengths, found.neutral) < found.strengths[k] < max(*strengths, found.neutral):
        return None
    less = RotationSet({found.name: replace(found, strengths=strengths)}, {found.name: r[others]})
    return less[found.name, found.strengths[k]].matrix


def _measure(
    before: Tensor, after: Tensor, maps: Mapping[str, Tensor], candidates: Tensor, mean: Callable
) -> Row:
    """How near `after` (N, d) each of `maps` (d, d) leads from `before` (N, d), and whether it finds it."""
    row: Row = {}
    queries = {suffix: before @ matrix.T for suffix, matrix in maps.items()} | {"_unrotated": before}
    for suffix, query in queries.items():
        row[f"cosine{suffix}"] = mean(F.cosine_similarity(query, after))
        if suffix != "_between":
            found = metrics.retrieval(query[: len(candidates), None], candidates)
            for key, hits in found.items():
                percent = 100 if key.startswith("hit") else 1
                row[f"same_image_{key}{suffix}"] = percent * mean(hits[:, 0])
    return row


def _intervals(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Of each metric over those of K `rows` that have it: mean and 95 % bounds, None where there are none.

    Images are resampled; strengths are not, for they are chosen and no sample of others.
    """
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        parts = zip(*values, strict=True) if isinstance(values[0], tuple) else [values]
        statistics, *motions = (torch.stack(list(part)).mean(dim=0, keepdim=True) for part in parts)
        generator = seeded_generator(seed, "bootstrap", "strengths")
        found[name] = rounded(metrics.bootstrap_interval(statistics, generator, *motions))
    return found


def _fit_pairs(encoder: Encoder, space: str, name: str, sources: Sequence[str], limit: int, seed: int) -> Fit:
    """The rotation from images, or embeddings, to those of the same names in another source."""
    sides = [_by_name(encoder, space, source) for source in sources]
    names = sorted(sides[0].keys() & sides[1].keys())
    names = [names[k] for k in permutation(len(names), seed, "images")[:limit].tolist()]
    if len(names) < FEWEST_IMAGES:
        few = f"have {len(names)} names in common, too few to fit and measure rotations"
        raise CareHubError(f"'{sources[0]}' and '{sources[1]}' {few}.")
    z, view = (_embed_named(encoder, space, [side[name] for name in names]) for side in sides)
    _warn_of_few(*z[: len(z) // 2].shape)
    asked = slice(len(z) // 2, len(z) // 2 + CANDIDATE_IMAGES)
    candidates = torch.stack([view[asked], z[asked]], dim=1)
    pair = Transformation(name, lambda x, t: x, "share of the change", 0.0, 0.0, 1.0, (1.0,), "linear")
    dataset = " to ".join(Path(source).name for source in sources)
    return _fit(_unmeasured(pair, [1.0], 2, dataset, len(z)), z, view[None], [candidates], seed)


def _by_name(encoder: Encoder, space: str, source: str) -> dict[str, Any]:
    """name -> file, in a folder of images; name -> embedding, in a file of `care-hub embed`."""
    if os.path.isdir(source):
        files, names = list_images(source)
        return dict(zip(names, files, strict=True))
    names, z, about = read_embeddings(source)
    if (about.get("encoder"), about.get("space")) != (encoder.fingerprint, space):
        raise CareHubError(f"'{source}' has embeddings of another encoder, or not of `space='{space}'`.")
    return dict(zip(names, torch.from_numpy(z.copy()), strict=True))


def _embed_named(encoder: Encoder, space: str, items: list[Any]) -> Tensor:
    if isinstance(items[0], Tensor):
        return F.normalize(torch.stack(items), dim=1)
    return _embed(encoder, space, _decode(encoder, items))

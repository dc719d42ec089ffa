"""Stored embeddings carried over to a new encoder, without the images: `care-hub upgrade`."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..augment import permutation
from ..embed_folder import (
    dimensions,
    parquet_files,
    read_embeddings,
    read_origins,
    stream_named_embeddings,
    write_named_embeddings,
)
from ..errors import CareHubError, printable
from ..files import make_folder, replacement
from ..rotation import least_squares, procrustes

NEIGHBORS = 10
NEEDED = 50.0  # recall@10 on images that were not used for fitting, in percent
FEWEST_PAIRS = 200  # below, ten of the images that measure would be no choice among them
PAIRS_PER_DIMENSION = 4  # fewer warn
MOST_MEASURED = 2000  # pairs
GAIN = 1.0  # percent of recall@10 that a linear map has to be better than an orthogonal one, to be taken

logger = logging.getLogger(__name__)


class Fit(NamedTuple):
    """A map from old embeddings to new ones, and how good it is."""

    name: str  # "orthogonal" or "linear"
    matrix: Tensor  # (d_new, d_old) in float64
    measured: dict[str, Any]  # numbers of pairs; recall@10 in percent and cosine on those left out


def upgrade(sources: Sequence[str], pairs: str, output: str, force: bool = False) -> str:
    """`care-hub upgrade`: write the embeddings in `sources` as if of the encoder of `pairs`; says what was.

    `sources`: files of `care-hub embed` (.parquet), or folders of such, of one encoder and one folder
    of images, read in constant memory. `pairs`: new embeddings of some of these images, by another
    encoder. `output`: a .parquet file of unit vectors, all of them mapped. Those in `pairs` are too:
    a query is nearer to true embeddings than to mapped ones, and would find these images too often.
    Raises CareHubError, also where the map is not good enough, unless `force`.
    """
    target, files = Path(output), parquet_files(sources)
    if target.suffix != ".parquet":
        raise CareHubError(f"'{output}' must end in .parquet.")
    if target.resolve() in [path.resolve() for path in (*files, Path(pairs))]:
        raise CareHubError(f"'{output}' is read here; give another name to what is written.")
    abouts = read_origins(files)
    old = abouts[0]
    if len({about.get("images", "") for about in abouts}) > 1:
        raise CareHubError("these files are of several folders, with names of their own; upgrade them apart.")
    make_folder(target.absolute().parent)
    names, z_new, new = read_embeddings(pairs)
    if not new.get("encoder") or not new.get("space"):
        raise CareHubError(f"'{pairs}' does not say which encoder made it; embed its images again.")
    if "carried_over" in new:
        raise CareHubError(f"'{pairs}' was carried over itself; `pairs` takes embeddings by the encoder.")
    if (new["encoder"], new["space"]) == (old["encoder"], old["space"]):
        raise CareHubError(f"'{pairs}' is of the same encoder as '{files[0]}'; there is nothing to upgrade.")
    known = dict(zip(names, _unit(z_new), strict=True))
    d = dimensions(files[0])
    found, count = _find(files, d, known)
    if len(found) < FEWEST_PAIRS:
        common = f"'{pairs}' has {len(found):,} images in common with the old embeddings, by their names"
        raise CareHubError(f"{common}; {FEWEST_PAIRS} are needed, and 1,000 are better.")
    before, after = (torch.from_numpy(np.stack([z[name] for name in found])) for z in (found, known))
    fit = fit_map(before, after)
    if fit.measured["recall_at_10"] < NEEDED and not force:
        advice = f"{NEEDED:g} % are needed; embed the images anew, or take `force` to write it all the same"
        raise CareHubError(f"these embeddings can't be carried over: {_quality(fit)}; {advice}.")
    origin: dict[str, Any] = {
        "from": old["encoder"],
        "from_name": old.get("encoder_name", ""),
        "from_space": old["space"],
    }
    origin |= {"map": fit.name} | fit.measured
    about = {key: new.get(key, "") for key in ("encoder", "space", "encoder_name", "revision")}
    about |= {"images": old.get("images", ""), "carried_over": json.dumps(origin)}
    with replacement(target) as new_file:
        write_named_embeddings(new_file, len(fit.matrix), _carry_over(files, d, fit), about)
    written = f"{count:,} embeddings of {len(fit.matrix)} numbers in {target}"
    return printable(f"{written}; {_quality(fit)}")


def fit_map(z_old: Tensor, z_new: Tensor, seed: int = 0) -> Fit:
    """The map from (N, d_old) to (N, d_new) unit vectors: fitted on 3/4, measured on 1/4 of them.

    Orthogonal (where d differs: into a larger space, or out of one), unless a linear map fitted on one
    half is better on the next quarter. `z_old[i]`, `z_new[i]` are of one image. Warns of few pairs.
    """
    part = min(len(z_old) // 4, MOST_MEASURED)
    order = permutation(len(z_old), seed, "pairs")
    fitting, choosing, measuring = order.split([len(order) - 2 * part, part, part])
    both = torch.cat([fitting, choosing])
    d = max(z_old.shape[1], z_new.shape[1])
    if len(both) < PAIRS_PER_DIMENSION * d:
        enough = f"take {-(-PAIRS_PER_DIMENSION * d * 4 // 3):,} or more, of which 3/4 are for fitting"
        logger.warning("%d pairs are few for a map in %d dimensions; %s.", len(both), d, enough)
    maps = {name: fit(z_old[fitting], z_new[fitting]) for name, fit in MAPS.items()}

    def recall(mapped: Tensor, rows: Tensor) -> float:
        return neighbor_recall(z_new[rows], mapped).mean().item() * 100

    gain = recall(z_old[choosing].double() @ maps["linear"].T, choosing)
    gain -= recall(z_old[choosing].double() @ maps["orthogonal"].T, choosing)
    name = "linear" if gain > GAIN else "orthogonal"
    matrix = MAPS[name](z_old[both], z_new[both])
    before, after = z_old[measuring], z_new[measuring]
    carried = F.normalize(before.double() @ matrix.T, dim=1)
    alike = before.shape == after.shape
    measured = {
        "fitted_pairs": len(both),
        "measured_pairs": part,
        "recall_at_10": recall(carried, measuring),
        "recall_at_10_chance": 100 * NEIGHBORS / (part - 1),
        "recall_at_10_without_map": recall(before, measuring) if alike else None,
        "cosine": (carried * after).sum(dim=1).mean().item(),
        "cosine_without_map": (before * after).sum(dim=1).mean().item() if alike else None,
    }
    return Fit(name, matrix, measured)


def neighbor_recall(z: Tensor, carried: Tensor, k: int = NEIGHBORS) -> Tensor:
    """(N,): which share of the `k` rows of `z` nearest to row i are among the k of `carried` nearest to it.

    `z`, `carried`: (N, d) with N > k, by cosine similarity; row i itself does not count.

    >>> z = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    >>> neighbor_recall(z, z[[0, 2, 1]], k=1)
    tensor([0., 0., 1.])
    """
    z, carried = (F.normalize(rows.double(), dim=1) for rows in (z, carried))
    near = []
    for candidates in (z, carried):
        similarity = z @ candidates.T
        similarity.fill_diagonal_(-2)
        near.append(torch.zeros_like(similarity).scatter(1, similarity.topk(k).indices, 1))
    return (near[0] * near[1]).sum(dim=1).float() / k


def _orthogonal(z_old: Tensor, z_new: Tensor) -> Tensor:
    """(d_new, d_old) with orthonormal columns or rows: Procrustes with zeros for lacking dimensions."""
    d_old, d_new = z_old.shape[1], z_new.shape[1]
    d = max(d_old, d_new)
    return procrustes(F.pad(z_old, (0, d - d_old)), F.pad(z_new, (0, d - d_new)))[:d_new, :d_old]


MAPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"orthogonal": _orthogonal, "linear": least_squares}


def _unit(z: np.ndarray) -> np.ndarray:
    return z / np.linalg.norm(z, axis=1, keepdims=True).clip(1e-12)


def _find(files: Sequence[Path], d: int, known: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    """The old embeddings, as unit vectors, of the images in `known`, and how many there are in all.

    Raises CareHubError for one that is there twice, and embeddings that are not finite.
    """
    found: dict[str, np.ndarray] = {}
    count = 0
    for path in files:
        for names, z in stream_named_embeddings(path, d):
            if not np.isfinite(z).all():
                raise CareHubError(f"'{path}' has embeddings that are not finite numbers.")
            count += len(names)
            rows = [row for row, name in enumerate(names) if name in known]
            for row, vector in zip(rows, _unit(z[rows]), strict=True):
                if names[row] in found:
                    raise CareHubError(f"'{names[row]}' is twice among the old embeddings; give each once.")
                found[names[row]] = vector
    return found, count


def _carry_over(files: Sequence[Path], d: int, fit: Fit) -> Iterator[tuple[list[str], np.ndarray]]:
    """Names and new embeddings."""
    matrix = fit.matrix.T.float().numpy()
    for path in files:
        for names, z in stream_named_embeddings(path, d):
            yield names, _unit(z @ matrix)


def _quality(fit: Fit) -> str:
    """The measures in words."""
    found = fit.measured
    recall, chance = found["recall_at_10"], found["recall_at_10_chance"]
    without = found["recall_at_10_without_map"]
    beside = (
        f"chance {chance:.1f} %" if without is None else f"{without:.1f} % without it, chance {chance:.1f} %"
    )
    by = f"{fit.name} map of {found['fitted_pairs']:,} pairs, on {found['measured_pairs']:,} others"
    return f"{by}: recall@10 {recall:.1f} % ({beside}), cosine {found['cosine']:.3f}"

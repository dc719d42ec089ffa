"""The nearest of stored embeddings to an image, or to what rotations make of it: `care-hub search`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..embed_folder import parquet_files, read_origins, stream_embeddings
from ..encoder import Encoder
from ..errors import CareHubError
from ..hub.registry import locate
from ..hub.rotation_set import RotationSet, find_rotations


class Hit(NamedTuple):
    """An image that was found."""

    path: str  # as the embeddings name it
    similarity: float  # cosine, from -1 to 1
    file: str  # where the image was when it was embedded; empty where the embeddings do not say


def search(
    sources: Sequence[str],
    query: str,
    encoder: str | None = None,
    steer: Sequence[str] = (),
    k: int = 10,
    force: bool = False,
    ignore: Sequence[str] = (),
    match: Sequence[str] = (),
) -> list[Hit]:
    """`care-hub search`: the `k` images nearest to `query`, nearest first; all are compared.

    `sources`: files of `care-hub embed` (.parquet), or folders of such, of one encoder. `encoder`: by
    default the one that they name, which must be as it was. `steer`: "brightness=1.4", ..., rotations of
    the query, first to last. `ignore`, `match`: transformations whose effects do not count, or alone
    count, see `RotationSet.project`. Raises CareHubError, also for steering by what is not steerable
    unless `force`.
    """
    if os.path.isdir(query):
        raise CareHubError(f"a query is one image; '{query}' is a folder.")
    files = parquet_files(sources)
    abouts = read_origins(files)
    fingerprint, space = abouts[0]["encoder"], abouts[0]["space"]
    name = encoder or abouts[0].get("encoder_name")
    if not name:
        raise CareHubError(f"'{files[0]}' does not name its encoder; give it as `encoder`.")
    folder = locate(name, revision=None if encoder else abouts[0].get("revision") or None)
    loaded = Encoder.from_folder(folder)
    if loaded.fingerprint != fingerprint:
        which = f"'{name}' is not the encoder of these embeddings"
        raise CareHubError(f"{which}; give that one as `encoder`, or embed the images again.")
    z = loaded.encode(query, space=space, normalize=True)
    projector = None
    if steer or ignore or match:
        rotations = find_rotations(folder, name)
        if (rotations.encoder, rotations.space) != (fingerprint, space):
            raise CareHubError(
                f"the rotations of '{name}' are of other embeddings than these; fit them again."
            )
        z = rotations.turn(z, parse_steer(rotations, steer, force))
        projector = rotations.projector(ignore, match) if ignore or match else None
    found = nearest(files, z[0], k, None if projector is None else projector.float().numpy())
    roots = [about.get("images", "") for about in abouts]
    names: dict[tuple[int, int], str] = {}
    for file in {file for file, _, _ in found}:
        rows = [row for other, row, _ in found if other == file]
        names |= {(file, row): name for row, name in zip(rows, _paths(files[file], rows), strict=True)}
    return [
        Hit(path := names[file, row], similarity, os.path.join(roots[file], path) if roots[file] else "")
        for file, row, similarity in found
    ]


def parse_steer(rotations: RotationSet, steer: Sequence[str], force: bool = False) -> dict[str, float]:
    """ "brightness=1.4", ... as name -> strength.

    Raises CareHubError for what is not fitted, and unless `force` for what is not steerable.
    """
    found: dict[str, float] = {}
    for text in steer:
        name, _, value = text.rpartition("=")
        try:
            strength = float(value)
        except ValueError:
            strength = float("nan")
        if not name or strength != strength:
            raise CareHubError(f"`steer='{text}'` should look like 'brightness=1.4'.")
        about = rotations.find(name)
        if not about.steerable and not force:
            measured = (about.overall.get("same_image_hit_at_1") or [None])[0]
            rate = "unknown" if measured is None else f"{measured:.3g} %, {about.needed:.3g} % are needed"
            reason = f"the same image is found: {rate}; `force` steers all the same"
            raise CareHubError(f"embeddings of this encoder can't be steered by {name} ({reason}).")
        if name in found:
            raise CareHubError(f"`steer` has {name} twice; give it once.")
        found[name] = strength
    return found


def nearest(
    files: Sequence[Path], query: np.ndarray, k: int, projector: np.ndarray | None = None
) -> list[tuple[int, int, float]]:
    """(file, row, cosine) of the `k` embeddings nearest to `query` (d,), nearest first; in constant memory.

    Equal ones in the order of the files. `projector` (d, d): all are multiplied with it before. Raises
    CareHubError for files that are no embeddings of d numbers.
    """
    best: list[tuple[int, int, float]] = []
    query = query if projector is None else query @ projector
    query = (query / np.linalg.norm(query).clip(1e-12)).astype(np.float32)
    for number, path in enumerate(files):
        start = 0
        for z in stream_embeddings(path, len(query)):
            z = z if projector is None else z @ projector
            similarity = z @ query
            similarity /= np.sqrt(np.einsum("nd,nd->n", z, z)).clip(1e-12)
            if not np.isfinite(similarity).all():
                raise CareHubError(f"'{path}' has embeddings that are not finite numbers.")
            rows = np.argpartition(-similarity, k - 1)[:k] if k < len(z) else np.arange(len(z))
            best += [(number, start + int(row), float(similarity[row])) for row in rows]
            best = sorted(best, key=lambda hit: (-hit[2], hit[:2]))[:k]
            start += len(z)
    return best


def _paths(path: Path, rows: list[int]) -> list[str]:
    """The names of the images in these rows of a file. Raises CareHubError for a file without names."""
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, columns=["path"], memory_map=True)["path"].take(rows).to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise CareHubError(f"'{path}' has no names of images ({error}).") from error

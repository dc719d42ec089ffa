"""Named rotations of an encoder, each with its measured quality: rotations.safetensors beside it."""

import dataclasses
import json
import logging
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CareHubError, suggest
from ..files import make_folder, own_file, read_header, read_tensors, write_tensors
from ..rotation import Embeddings, Rotation, logarithm
from ..schema import check_type
from ..transformations import SCALES, position
from .evaluation_record import Interval
from .export import READ_ERRORS, content_sum, folder_lock, sha256

logger = logging.getLogger(__name__)

FILE_NAME = "rotations.safetensors"
WEIGHTS = ("model.safetensors", "projection.safetensors")  # to which rotations belong
ROTATION, LOG, MOVED = "rotation.", "log.", "moved."  # what the names of tensors begin with
SPANNED = 1e-3  # singular values below this span nothing
TIMES_CHANCE, TIMES_ITSELF = 3, 1.5  # what the lower bound of H@1 must reach for "steerable"
NOT_FITTED = "fit them with `care-hub rotations`"


@dataclass(frozen=True)
class FittedTransformation:
    """A transformation, the strengths to which rotations were fitted, and how good they are.

    A measure is (mean, lower, upper end of its 95 % interval) under its name in `metrics.METRICS`.
    """

    name: str
    meaning: str  # of the strength
    scale: str  # of SCALES
    neutral: float  # the strength that changes nothing
    strengths: list[float]  # (K,), ascending
    measured: list[dict[str, Interval]]  # (K,)
    overall: dict[str, Interval]  # over all strengths
    candidates: int  # views of the same image among which the right one is to be found
    dataset: str  # on which they were fitted and measured
    images: int  # of which one half fitted them, the other measured
    version: str  # of care_hub
    seed: int = 0  # of the choice of images and of the bootstrap
    source: str = ""  # "data set", "folder" or "pairs"; empty: by a version that did not say
    data: dict[str, str | bool] = field(default_factory=dict)  # see `data.sources.data_of`

    @property
    def needed(self) -> float:
        """The `same_image_hit_at_1`, in percent, that makes it steerable.

        3 times chance; where that is more than half-way from chance to certainty, as for two
        candidates, half-way.
        """
        chance = 100 / self.candidates
        return min(TIMES_CHANCE * chance, (100 + chance) / 2)

    @property
    def steerable(self) -> bool:
        """Whether embeddings can be steered: R f(x) tells which strength was applied.

        The lower 95 % bound of `same_image_hit_at_1` is at least `needed`, and 1.5 times the figure
        of f(x) itself; and the cosine with f(ax) is higher than that of f(x).
        """
        found, itself, cosine, still = (
            self.overall.get(f"{name}{suffix}", (None,) * 3)
            for name in ("same_image_hit_at_1", "cosine")
            for suffix in ("", "_unrotated")
        )
        if found[1] is None or itself[0] is None or cosine[0] is None or still[0] is None:
            return False
        return found[1] >= max(self.needed, TIMES_ITSELF * itself[0]) and cosine[0] > still[0]


@dataclass
class RotationSet:
    """The rotations of an encoder, by transformation and strength.

    >>> one = FittedTransformation("light", "factor", "log", 1.0, [4.0], [{}], {}, 50, "mine", 9, "1")
    >>> rotations = RotationSet({"light": one}, {"light": -torch.eye(2)[None]})
    >>> rotations["light", 2.0].power(2).matrix.round()  # half-way to 4 on a logarithmic scale
    tensor([[-1.,  0.],
            [ 0., -1.]], dtype=torch.float64)
    """

    fitted: dict[str, FittedTransformation]
    matrices: dict[str, Tensor]  # (K, d, d) each, for the K strengths
    encoder: str = ""  # its fingerprint
    encoder_name: str = ""
    space: str = "projection"  # whose unit vectors rotate
    weights: dict[str, str] = field(default_factory=dict)  # sha256 of those of WEIGHTS that there are
    moved: dict[str, Tensor] = field(default_factory=dict)  # (d, r): what a transformation moves, orthonormal

    def __getitem__(self, key: tuple[str, float]) -> Rotation:
        """The rotation of a transformation of any strength within those that were fitted.

        Between two of them, or one and the neutral strength, whose rotation is I, it is the part of
        the geodesic from one to the other that the strength is on its scale. Raises CareHubError
        for an unknown transformation, and for a strength outside.
        """
        name, strength = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        found = self.find(str(name))
        if not isinstance(strength, int | float):
            example = f"rotations[{found.name!r}, {found.strengths[-1]:g}]"
            raise CareHubError(f"a rotation has a transformation and a strength, as in {example}.")
        knots = sorted([*found.strengths, found.neutral])
        if not knots[0] <= strength <= knots[-1]:  # NaN is not
            fits = f"rotations of {found.name} go from {knots[0]:g} to {knots[-1]:g} ({found.meaning})"
            raise CareHubError(f"{fits}, not to {strength:g}; fit one with `care-hub rotations`.")
        above = bisect_left(knots, strength)
        if knots[above] == strength:
            return self._fit(found, strength)
        if found.scale == "switch":
            raise CareHubError(f"{found.name} is on ({found.strengths[-1]:g}) or off, not {strength:g}.")
        low, here, high = (position(found.scale, s) for s in (knots[above - 1], strength, knots[above]))
        start, end = (self._fit(found, knot) for knot in (knots[above - 1], knots[above]))
        return start.toward(end, (here - low) / (high - low))

    def _fit(self, found: FittedTransformation, strength: float) -> Rotation:
        """That of a strength that was fitted, or of the neutral one."""
        fits = self.matrices[found.name]
        if strength == found.neutral:
            return Rotation(torch.eye(fits.shape[-1]), self.encoder or None)
        return Rotation(fits[found.strengths.index(strength)], self.encoder or None)

    def turn(self, z: Embeddings, steer: Mapping[str, float]) -> Embeddings:
        """Embeddings (..., N, d) or (d,) after the rotations of `steer`, name -> strength, first to last.

        The query for any index of unchanged embeddings; same type as `z`. Raises CareHubError as
        `rotations[name, strength]` does.
        """
        for name, strength in steer.items():
            z = self[name, strength](z)
        return z

    def project(self, z: Embeddings, ignore: Sequence[str] = (), match: Sequence[str] = ()) -> Embeddings:
        """Embeddings (N, d) or (d,) without what the transformations `ignore` move, as unit vectors.

        With `match`, only what these move is kept. Same type as `z`. Raises CareHubError for
        transformations that were not fitted, and where nothing would be left.
        """
        kept = self.projector(ignore, match)
        if isinstance(z, np.ndarray):
            z = z @ kept.numpy().astype(z.dtype)
            return z / np.linalg.norm(z, axis=-1, keepdims=True).clip(1e-12)
        return F.normalize(z @ kept.to(z), dim=-1)

    def projector(self, ignore: Sequence[str] = (), match: Sequence[str] = ()) -> Tensor:
        """The symmetric matrix (d, d) that `project` multiplies with, in float64."""
        d = next(iter(self.matrices.values())).shape[-1]
        out, kept = (self._basis(names) for names in (ignore, match))
        kept = torch.eye(d, dtype=torch.float64) if kept is None else kept
        kept = kept if out is None else _orthonormal(kept - out @ (out.T @ kept))
        if not kept.shape[1]:
            names = f"{', '.join(ignore)} moves all that there is"
            raise CareHubError(
                f"nothing is left to compare: {names}{' of ' + ', '.join(match) if match else ''}."
            )
        return kept @ kept.T

    def _basis(self, names: Sequence[str]) -> Tensor | None:
        """(d, r) orthonormal: what these transformations move together; None without names."""
        parts = [self.moved[self.find(name).name].double() for name in names]
        return _orthonormal(torch.cat(parts, dim=1)) if parts else None

    def __iter__(self) -> Iterator[str]:
        """The names of the transformations."""
        return iter(self.fitted)

    def __len__(self) -> int:
        return len(self.fitted)

    def find(self, name: str) -> FittedTransformation:
        """The transformation called `name`. Raises CareHubError where it was not fitted."""
        if name not in self.fitted:
            near = suggest(name, self.fitted) or ";"
            known = ", ".join(self.fitted)
            raise CareHubError(f"there are no rotations of '{name}'{near} this encoder has those of {known}.")
        return self.fitted[name]

    @property
    def steerable(self) -> list[str]:
        """The names of the transformations by which embeddings can be steered."""
        return [name for name, found in self.fitted.items() if found.steerable]

    def updated(self, others: "RotationSet") -> "RotationSet":
        """These rotations with `others` of the same encoder, which replace those of the same name."""
        if (self.encoder, self.space) != (others.encoder, others.space):
            raise CareHubError("these rotations belong to different embedding spaces.")
        kept = {name: getattr(self, name) | getattr(others, name) for name in ("fitted", "matrices", "moved")}
        return dataclasses.replace(others, **kept)

    def save(self, folder: str | Path, half: bool = False) -> Path:
        """Write rotations.safetensors into `folder`, with its sha256 in it.

        With `half` it has a quarter of the size: float16, and of each R the part of log R above the
        diagonal, which is a rotation however it is rounded.
        """
        path = make_folder(folder) / FILE_NAME
        with folder_lock(path.parent):
            self._write(path, half)
        return path

    def add_to(self, folder: Path) -> "RotationSet":
        """`save` beside those of other names that are in `folder` already; gives all."""
        with folder_lock(folder):
            together = self
            try:
                if before := read_rotations(folder):
                    for name in before.fitted.keys() & self.fitted.keys():
                        logger.info("This replaces the rotations of %s that were fitted before.", name)
                    together = before.updated(self)
            except CareHubError as error:
                logger.warning("The rotations that were in '%s' are replaced: %s", folder, error)
            together._write(folder / FILE_NAME)
        return together

    def _write(self, path: Path, half: bool = False) -> None:
        about = {"fitted": json.dumps([dataclasses.asdict(found) for found in self.fitted.values()])}
        about |= {"encoder": self.encoder, "encoder_name": self.encoder_name, "space": self.space}
        about["weights"] = json.dumps(self.weights)
        maps = {name: _logs(fits) for name, fits in self.matrices.items()} if half else self.matrices
        kinds = {LOG if half else ROTATION: maps, MOVED: self.moved}
        tensors = {
            f"{kind}{name}": values[name].to("cpu", torch.float16 if half else torch.float32).contiguous()
            for kind, values in kinds.items()
            for name in self.fitted
        }
        about["sha256"] = content_sum([tensors[name] for name in sorted(tensors)], about)
        write_tensors(path, tensors, about)

    @classmethod
    def load(cls, path: str | Path) -> "RotationSet":
        """Read one file, trusting nothing in it.

        Raises CareHubError if it is not a set of rotations, is damaged or cut short, or belongs to
        other weights than those beside it.
        """
        path = Path(path)
        header, about = read_header(path)
        try:
            fitted = {entry.name: entry for entry in _entries(json.loads(about["fitted"]))}
            weights = json.loads(about["weights"])
            check_type(weights, dict[str, str], "weights")
            names = {name: about[name] for name in ("encoder", "encoder_name", "space")}
            if names["space"] not in ("projection", "backbone"):
                raise ValueError(f"space {names['space']}")
            own = _expected(fitted, header)
        except READ_ERRORS as error:
            raise CareHubError(f"'{path}' is not a set of rotations of care_hub ({error!r:.200}).") from error
        tensors = read_tensors(path, own)
        sum_of_values = content_sum([tensors[name] for name in sorted(tensors)], about)
        if about.get("sha256") != sum_of_values:
            raise CareHubError(f"'{path}' is damaged: its sha256 is wrong; fetch it or fit it again.")
        half = f"{LOG}{min(fitted)}" in tensors
        kinds = (LOG if half else ROTATION, MOVED)
        matrices, moved = ({name: tensors[f"{kind}{name}"] for name in fitted} for kind in kinds)
        if half:
            matrices = {name: _from_logs(logs) for name, logs in matrices.items()}
            moved = {name: _unrounded(basis) for name, basis in moved.items()}
        for name in fitted:
            _check_proper(matrices[name], moved[name], f"'{path}' has no rotations for '{name}'")
        for name in WEIGHTS:
            beside = path.parent / name
            if name in weights and own_file(beside) and sha256(beside) != weights[name]:
                raise CareHubError(f"'{path}' was fitted on other weights than '{beside}'; fit it again.")
        return cls(fitted, matrices, **names, weights=weights, moved=moved)


def _logs(rotations: Tensor) -> Tensor:
    """(K, d (d - 1) / 2): log R above the diagonal, row by row, of K proper rotations (K, d, d)."""
    d = rotations.shape[-1]
    logs = torch.stack([logarithm(r) for r in Rotation(rotations).matrix])
    return logs[:, torch.ones(d, d, dtype=torch.bool).triu(1)]


def _from_logs(logs: Tensor) -> Tensor:
    """(K, d, d), the rotations of `_logs`."""
    d = _dimension(logs.shape[-1])
    matrix = torch.zeros(len(logs), d, d, dtype=torch.float64)
    matrix[:, torch.ones(d, d, dtype=torch.bool).triu(1)] = logs.double()
    return torch.linalg.matrix_exp(matrix - matrix.mT)


def _dimension(numbers: int) -> int:
    """The d of which d (d - 1) / 2 numbers are above the diagonal."""
    return (1 + math.isqrt(1 + 8 * numbers)) // 2


def _unrounded(basis: Tensor) -> Tensor:
    """A basis (d, r), orthonormal but for float16, after a Newton step to the nearest that is."""
    basis = basis.double()
    return basis @ (3 * torch.eye(basis.shape[1]).to(basis) - basis.mT @ basis) / 2


def _check_proper(rotations: Tensor, moved: Tensor, failure: str) -> None:
    """Raise CareHubError unless these are proper rotations, and orthonormal columns."""
    try:
        proper = bool((torch.linalg.det(Rotation(rotations).matrix) > 0).all())
    except CareHubError as error:
        raise CareHubError(f"{failure}: {error}") from error
    gram = moved.double().T @ moved.double()
    if not proper or not torch.allclose(gram, torch.eye(len(gram)).to(gram), atol=1e-5, rtol=0):
        reason = "the basis of what moves is not orthonormal" if proper else "a map has determinant -1"
        raise CareHubError(f"{failure}: {reason}.")


def _orthonormal(x: Tensor) -> Tensor:
    """(d, r): a basis of the space that the columns of `x` span."""
    u, size, _ = torch.linalg.svd(x, full_matrices=False)
    return u[:, size > SPANNED]


def _entries(values: Any) -> list[FittedTransformation]:
    """The transformations out of a file, what newer versions add left out. Raises READ_ERRORS."""
    known = [f.name for f in dataclasses.fields(FittedTransformation)]
    check_type(values, list[dict[str, Any]], "fitted")
    entries = [{name: value[name] for name in known if name in value} for value in values]
    check_type(entries, list[FittedTransformation], "fitted")
    found = [FittedTransformation(**entry) for entry in entries]
    for entry in found:
        sound = entry.scale in SCALES and len(entry.measured) == len(entry.strengths) > 0
        positive = entry.scale != "log" or min(*entry.strengths, entry.neutral) > 0
        ascending = all(low < high for low, high in pairwise(entry.strengths))
        if not sound or not positive or not ascending or entry.neutral in entry.strengths:
            raise ValueError(f"the strengths of {entry.name} make no sense")
        if entry.candidates < 2:
            raise ValueError(f"{entry.name} has {entry.candidates} candidates")
    if not found or len({entry.name for entry in found}) < len(found):
        raise ValueError("no transformation, or one twice")
    return found


def _expected(fitted: dict[str, FittedTransformation], header: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a file must have, without values. Raises READ_ERRORS."""
    own = {}
    half = f"{LOG}{min(fitted)}" in header
    *_, d = header[f"{LOG if half else ROTATION}{min(fitted)}"].shape
    d = _dimension(d) if half else d
    empty = partial(torch.empty, dtype=torch.float16 if half else torch.float32, device="meta")
    for name, found in fitted.items():
        *_, r = header[f"{MOVED}{name}"].shape
        if not 1 <= r <= d:
            raise ValueError(f"{r} of {d} dimensions move")
        rows = (LOG, (d * (d - 1) // 2,)) if half else (ROTATION, (d, d))
        own[f"{rows[0]}{name}"] = empty(len(found.strengths), *rows[1])
        own[f"{MOVED}{name}"] = empty(d, r)
    return own


def read_rotations(folder: Path) -> RotationSet | None:
    """The rotations in an export folder, if there are any. Raises CareHubError for a damaged file."""
    path = folder / FILE_NAME
    return RotationSet.load(path) if own_file(path) else None


def find_rotations(folder: Path, source: str | Path) -> RotationSet:
    """The rotations in an export folder; `source`: what the user calls the encoder.

    Raises CareHubError where there are none.
    """
    found = read_rotations(folder)
    if found is None:
        raise CareHubError(f"'{source}' has no {FILE_NAME}; {NOT_FITTED}.")
    return found

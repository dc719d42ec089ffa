"""Rotations of the embedding space: fit one, apply it, compose it, invert it, take part of it.

Fitting is the orthogonal Procrustes problem, known as Wahba's problem for proper rotations (det R = +1).
"""

import math
import os
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, linalg

from .errors import CareHubError
from .files import read_header, read_tensors, write_tensors

CHUNK = 65536  # rows raised to float64 at a time
ORTHOGONAL = 1e-6  # largest entry of R R^T - I that is rounding
RIDGE = 1e-3  # weight of |W|^2 relative to the mean of |z_i . e_k|^2
HALF_TURN = 1e-6  # singular values of R + I below this are half turns, where R = -1
STILL = 1e-12  # tangents of half an angle below this are rounding

Array: TypeAlias = np.ndarray | Tensor
Embeddings = TypeVar("Embeddings", np.ndarray, Tensor)


class HasFingerprint(Protocol):
    """An `Encoder`, of which a rotation needs to know no more."""

    @property
    def fingerprint(self) -> str: ...


def procrustes(z: Tensor, z_t: Tensor, special: bool = False) -> Tensor:
    """The orthogonal R (d, d) that minimizes sum_i |z_t_i - R z_i|^2.

    `z`, `z_t`: (N, d), or (..., N, d) for many problems at once; computed in float64.
    `special=True` restricts R to proper rotations (det R = +1) by flipping the weakest singular
    direction. Raises CareHubError for shapes that differ, no embeddings, and values that are not
    finite. Source: Schoenemann 1966; Wahba 1965: B = sum_i z_t_i z_i^T = U S V^T, R = U V^T.

    >>> procrustes(torch.eye(2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])).round() + 0.0
    tensor([[ 0., -1.],
            [ 1.,  0.]], dtype=torch.float64)
    """
    if z.shape != z_t.shape or z.ndim < 2 or not z.numel():
        shapes = f"{tuple(z.shape)} and {tuple(z_t.shape)}"
        raise CareHubError(f"a rotation is fitted on two sets of as many embeddings, got {shapes}.")
    chunks = zip(z.split(CHUNK, dim=-2), z_t.split(CHUNK, dim=-2), strict=True)
    cross = torch.as_tensor(sum(after.double().mT @ before.double() for before, after in chunks))
    if not cross.isfinite().all():
        raise CareHubError("some of these embeddings are not finite numbers, or too large.")
    u, _, vh = linalg.svd(cross)
    if special:
        sign = linalg.det(u @ vh).sign()[..., None, None]
        u = torch.cat([u[..., :-1], u[..., -1:] * sign], dim=-1)
    return u @ vh


def least_squares(z: Tensor, z_t: Tensor) -> Tensor:
    """The linear map W (d, d) that minimizes sum_i |z_t_i - W z_i|^2 + a little |W|^2, for `z` (N, d).

    `z_t`: (N, d), or (..., N, d) for many maps of the same `z`. What an orthogonal map is compared
    with, as nothing but linear is asked of it. In float64.
    """
    before, after = z.double(), z_t.double()
    gram = before.T @ before
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp(min=RIDGE))
    return linalg.solve(gram, before.T @ after).mT


class Rotation:
    """An orthogonal map R of R^d, or many of them: `matrix` is (..., d, d) in float64.

    `encoder` is the fingerprint of the encoder whose embeddings it rotates, if that is known.
    Raises CareHubError for a matrix that is not orthogonal.

    >>> quarter_turn = Rotation(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    >>> (quarter_turn @ quarter_turn)(np.array([1.0, 2.0]))
    array([-1., -2.])
    """

    def __init__(self, matrix: Array, encoder: str | None = None):
        matrix = _tensor(matrix).double()
        if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or not matrix.numel():
            raise CareHubError(f"a rotation is a square matrix, got the shape {tuple(matrix.shape)}.")
        error = (matrix @ matrix.mT - torch.eye(matrix.shape[-1]).to(matrix)).abs().max()
        if not error < ORTHOGONAL:  # NaN is not
            raise CareHubError(f"this matrix is not orthogonal: R R^T differs from I by {error:.1g}.")
        self.matrix, self.encoder = matrix, encoder

    @classmethod
    def fit(
        cls,
        z: Array,
        z_t: Array,
        special: bool = False,
        encoder: HasFingerprint | str | None = None,
    ) -> "Rotation":
        """The R with z_t ≈ R z in the least squares sense; `z`, `z_t` as in `procrustes`, or arrays.

        `special`: proper rotations only, which have fractional powers. `encoder`: whose embeddings
        these are, an `Encoder` or its fingerprint. Raises CareHubError as `procrustes` does.

        >>> z = torch.nn.functional.normalize(torch.arange(12.0).view(4, 3).sin())
        >>> Rotation.fit(z, z.roll(1, dims=1)).matrix.round().abs()
        tensor([[0., 0., 1.],
                [1., 0., 0.],
                [0., 1., 0.]], dtype=torch.float64)
        """
        return cls(procrustes(_tensor(z), _tensor(z_t), special), _fingerprint(encoder))

    @classmethod
    def random(cls, d: int, seed: int = 0) -> "Rotation":
        """A proper rotation from the uniform distribution over SO(d).

        Source: Stewart 1980 (QR of a Gaussian matrix, signs of R's diagonal made positive).

        >>> Rotation.random(3, seed=1)
        Rotation(d=3)
        """
        if d < 1:
            raise CareHubError(f"a rotation has at least 1 dimension, got {d}.")
        generator = torch.Generator().manual_seed(seed)
        q, r = linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))
        q *= r.diagonal().sign()
        q[:, 0] *= linalg.det(q).sign()
        return cls(q)

    @property
    def d(self) -> int:
        """Dimension of the embeddings."""
        return self.matrix.shape[-1]

    def __repr__(self) -> str:
        many = self.matrix.shape[:-2]
        return f"Rotation(d={self.d}, {tuple(many)})" if many else f"Rotation(d={self.d})"

    def __call__(self, z: Embeddings) -> Embeddings:
        """R z for (..., N, d) or (d,) embeddings; same type, dtype and device as `z`."""
        if z.shape[-1:] != (self.d,) or "float" not in str(z.dtype):
            found = f"got {z.dtype} of shape {tuple(z.shape)}"
            raise CareHubError(f"this rotation turns vectors of {self.d} floats, {found}.")
        if isinstance(z, np.ndarray):
            return z @ self.matrix.mT.cpu().numpy().astype(z.dtype)
        return z @ self.matrix.mT.to(z)

    def __matmul__(self, other: "Rotation") -> "Rotation":
        """First `other`, then this one: R_b @ R_a is the rotation of "a, then b"."""
        if self.d != other.d or len({self.encoder, other.encoder} - {None}) > 1:
            raise CareHubError("these two rotations belong to different embedding spaces.")
        return Rotation(_nearest_orthogonal(self.matrix @ other.matrix), self.encoder or other.encoder)

    def inv(self) -> "Rotation":
        """R^-1 = R^T."""
        return Rotation(self.matrix.mT, self.encoder)

    def power(self, t: float) -> "Rotation":
        """R^t, every rotation angle times t: `power(0.5)` is half the rotation.

        Raises CareHubError for a fractional power of a reflection (det -1), which is not real, and
        for a `t` that is not finite or above 2^53, whose angles nobody knows.

        >>> half_turn = Rotation(-torch.eye(2))
        >>> quarter_turn = half_turn.power(0.5)
        >>> torch.allclose((quarter_turn @ quarter_turn).matrix, half_turn.matrix)
        True
        """
        if not abs(t) <= 2**53:  # NaN is not
            raise CareHubError(f"a rotation has no power {t}.")
        if float(t).is_integer():
            power = linalg.matrix_power(self.matrix, int(t))
        elif (linalg.det(self.matrix) < 0).any():
            raise CareHubError(f"a map of determinant -1 has no real power {t}; fit it with `special=True`.")
        else:
            each = self.matrix.reshape(-1, self.d, self.d)
            power = torch.stack([_fractional_power(r, t) for r in each]).view_as(self.matrix)
        return Rotation(_nearest_orthogonal(power), self.encoder)

    def toward(self, other: "Rotation", t: float) -> "Rotation":
        """The part t of the shortest way to `other`: R1 exp(t log(R1^T R2)), the geodesic of SO(d).

        For two single rotations. Where R1^T R2 has half turns (R = -1) there are several shortest ways,
        of which one is taken, see `power`. Raises CareHubError as `power` and `@` do.

        >>> start, end = Rotation(torch.eye(2)), Rotation(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        >>> torch.allclose(start.toward(end, 0.5).power(2).matrix, end.matrix)
        True
        """
        return self @ (self.inv() @ other).power(t)

    def residual(self, z: Array, z_t: Array) -> float:
        """Mean |z_t - R z|^2 over (N, d) embeddings, the rotation error where R was fitted on others.

        Raises CareHubError for shapes that differ.
        """
        z, z_t = _tensor(z), _tensor(z_t)
        if z.shape != z_t.shape:
            raise CareHubError(f"these are embeddings of shapes {tuple(z.shape)} and {tuple(z_t.shape)}.")
        return (z_t.double() - self(z.double())).square().sum(dim=-1).mean().item()

    def check(self, encoder: HasFingerprint | str | None) -> None:
        """Raise CareHubError if this rotation is known to be of another encoder (`encoder` as in `fit`)."""
        if len({self.encoder, _fingerprint(encoder)} - {None}) > 1:
            raise CareHubError("this rotation was fitted on embeddings of another encoder; fit a new one.")

    def save(self, path: str | Path) -> Path:
        """Write the matrix and the encoder's fingerprint to a safetensors file; returns its path.

        Raises CareHubError where it can't be written.
        """
        path, tensors = Path(path), {"rotation": self.matrix.cpu().contiguous()}
        write_tensors(path, tensors, {"encoder": self.encoder or ""})
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Rotation":
        """Read what `save` wrote. Raises CareHubError if the file is missing, truncated or not a rotation."""
        try:
            real = Path(os.path.realpath(path))  # a link is the user's own
            header, about = read_header(real)
            shape = tuple(header["rotation"].shape) if "rotation" in header else ()
            own = {"rotation": torch.empty(shape, dtype=torch.float64, device="meta")}
            if len(shape) < 2 or shape[-1] != shape[-2] or 0 in shape:
                raise CareHubError(f"its matrix is of shape {shape}")
            return cls(read_tensors(real, own)["rotation"], about.get("encoder") or None)
        except (CareHubError, ValueError) as error:
            raise CareHubError(f"'{path}' is not a rotation saved by care_hub ({error}).") from error


def _tensor(values: Array) -> Tensor:
    """A tensor as it is, an array or a list as one. Raises CareHubError for rows of unlike length."""
    if isinstance(values, np.ndarray):  # torch takes none that is mirrored or of foreign byte order
        values = np.asarray(values, values.dtype.newbyteorder("="), order="C")
    try:
        return torch.as_tensor(values)
    except (ValueError, RuntimeError) as error:
        raise CareHubError(f"these are no embeddings and no matrix ({error}).") from error


def _fingerprint(encoder: HasFingerprint | str | None) -> str | None:
    """The fingerprint of an encoder, or the fingerprint itself."""
    name = str(encoder) if isinstance(encoder, str | Path) else ""
    if isinstance(encoder, Path) or name.endswith((".parquet", ".safetensors")):
        raise CareHubError(f"'{encoder}' is a file; pass `encoder=care_hub.fingerprint_of('{encoder}')`.")
    return encoder if encoder is None or isinstance(encoder, str) else encoder.fingerprint


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, so that long products do not drift."""
    u, _, vh = linalg.svd(matrix)
    return u @ vh


def planes(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The planes in which a proper rotation (d, d) turns: a, b (d, p), orthonormal, and angles (p,) to pi.

    R a = a cos(angle) + b sin(angle) for each column; what is orthogonal to all of them stays.

    The Cayley transform i (I - R)(I + R)^-1 is Hermitian with eigenvalues tan(angle / 2), a pair of
    them for each plane. It has no value for half turns (R = -1); these directions are taken in pairs.

    >>> a, b, angles = planes(torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double())
    >>> torch.allclose(angles, torch.tensor(math.pi / 2).double())
    True
    """
    eye = torch.eye(len(r)).to(r)
    _, size, vh = linalg.svd(r + eye)
    half = vh[size < HALF_TURN].T  # (d, k), k even
    flips = 2 * half @ half.T
    tangent, v = linalg.eigh(1j * linalg.solve(eye + r + flips, eye - r - flips, left=False))
    turns, v = tangent > STILL, v * math.sqrt(2)
    a = torch.cat([v.real[:, turns], half[:, ::2]], dim=1)
    b = torch.cat([-v.imag[:, turns], half[:, 1::2]], dim=1)
    angles = torch.cat([2 * torch.atan(tangent[turns]), r.new_full((half.shape[1] // 2,), math.pi)])
    return a, b, angles


def logarithm(r: Tensor) -> Tensor:
    """log R (d, d), skew-symmetric, of a proper rotation R (d, d): `torch.linalg.matrix_exp` takes it back.

    Each plane turns by at most pi; of the two ways round a half turn, one is taken.

    >>> logarithm(torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double()) / math.pi
    tensor([[ 0.0000, -0.5000],
            [ 0.5000,  0.0000]], dtype=torch.float64)
    """
    a, b, angles = planes(r)
    return (b * angles) @ a.T - (a * angles) @ b.T


def _fractional_power(r: Tensor, t: float) -> Tensor:
    """R^t of a proper rotation (d, d): each plane turns by t times its angle."""
    a, b, angles = planes(r)
    c, s = (t * angles).cos() - 1, (t * angles).sin()
    return torch.eye(len(r)).to(r) + (a * c + b * s) @ a.T + (b * c - a * s) @ b.T

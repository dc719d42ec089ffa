"""Rotations of the embedding space: fit one, apply it, compose it, take part of it.

The orthogonal Procrustes problem, known as Wahba's problem for proper rotations.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import CareHubError

CHUNK = 65536  # rows turned to float64 at a time
NEAR_HALF_TURN = 1e-6


def procrustes(z: Tensor, z_t: Tensor, special: bool = False) -> Tensor:
    """The orthogonal R (d, d) that minimises sum_i |z_t_i - R z_i|^2.

    `z`, `z_t`: (N, d), or (..., N, d) for many problems at once; computed in float64. `special=True` restricts to
    rotations proper (det R = +1) by turning the weakest singular direction.
    Source: Schoenemann 1966; Wahba 1965: B = sum z_t_i z_i^T = U S V^T, R = U V^T.
    """
    parts = zip(z.split(CHUNK, dim=-2), z_t.split(CHUNK, dim=-2), strict=True)
    cross = sum(after.double().transpose(-2, -1) @ before.double() for before, after in parts)
    u, _, vh = torch.linalg.svd(cross)
    if special:
        sign = torch.linalg.det(u @ vh).sign()
        u = torch.cat([u[..., :-1], u[..., -1:] * sign[..., None, None]], dim=-1)
    return u @ vh


class Rotation:
    """An orthogonal map R of R^d, or many: `matrix` is (..., d, d) in float64. `encoder` names the encoder whose embeddings
    it turns (its fingerprint), if that is known."""

    def __init__(self, matrix: Tensor, encoder: str | None = None):
        matrix = torch.as_tensor(matrix).double()
        if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
            raise CareHubError(f"a rotation is a square matrix, got the shape {tuple(matrix.shape)}.")
        error = (matrix @ matrix.transpose(-2, -1) - torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)).abs()
        if not error.max() < 1e-6:
            raise CareHubError(f"this matrix is not orthogonal: R R^T differs from the identity by {error.max():.1g}.")
        self.matrix, self.encoder = matrix, encoder

    @classmethod
    def fit(cls, z, z_t, special: bool = False, encoder=None) -> "Rotation":
        """The R with z_t ~ R z in the least squares sense; see `procrustes` for shapes. Arrays or tensors.

        `special`: proper rotations only (det +1), which have fractional powers. `encoder`: whose embeddings these are, see
        `fingerprint_of`. Raises CareHubError for shapes that differ and for values that are not finite.
        """
        z, z_t = torch.as_tensor(z), torch.as_tensor(z_t)
        if z.shape != z_t.shape or z.ndim < 2 or not z.numel():
            raise CareHubError(f"a rotation is fitted on two sets of as many embeddings, got {tuple(z.shape)} and {tuple(z_t.shape)}.")
        if not (z.isfinite().all() and z_t.isfinite().all()):
            raise CareHubError("these embeddings hold values that are not finite numbers.")
        return cls(procrustes(z, z_t, special), fingerprint_of(encoder))

    @classmethod
    def random(cls, d: int, seed: int = 0) -> "Rotation":
        """A proper rotation drawn uniformly. Source: Stewart 1980 (QR of a Gaussian matrix, signs of R made positive)."""
        q, r = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
        q = q * r.diagonal().sign()
        q[:, 0] *= torch.linalg.det(q).sign()
        return cls(q)

    @property
    def d(self) -> int:
        return self.matrix.shape[-1]

    def __repr__(self) -> str:
        return f"Rotation(d={self.d}{f', {tuple(self.matrix.shape[:-2])}' if self.matrix.ndim > 2 else ''})"

    def __call__(self, z):
        """R z for (..., N, d) or (d,) embeddings; array or tensor, of the type that came."""
        if self.d != z.shape[-1]:
            raise CareHubError(f"this rotation turns vectors of {self.d} numbers, these have {z.shape[-1]}.")
        if isinstance(z, np.ndarray):
            return z @ self.matrix.transpose(-2, -1).cpu().numpy().astype(z.dtype)
        return z @ self.matrix.transpose(-2, -1).to(z)

    def __matmul__(self, other: "Rotation") -> "Rotation":
        """First `other`, then this one."""
        if self.d != other.d or (None not in (self.encoder, other.encoder) and self.encoder != other.encoder):
            raise CareHubError("these two rotations belong to different embedding spaces.")
        return Rotation(_orthogonal(self.matrix @ other.matrix), self.encoder or other.encoder)

    def inv(self) -> "Rotation":
        return Rotation(self.matrix.transpose(-2, -1), self.encoder)

    def power(self, t: float) -> "Rotation":
        """R^t, every rotation angle times t: `power(0.5)` is half the rotation. Raises CareHubError for a fractional power of
        a reflection (det -1), which is not real.

        The Cayley transform i (I - R)(I + R)^-1 is Hermitian with eigenvalues tan(angle / 2); half turns, where it has no
        value, are turned in pairs of directions instead.
        """
        if float(t).is_integer():
            return Rotation(_orthogonal(torch.linalg.matrix_power(self.matrix, int(t))), self.encoder)
        if (torch.linalg.det(self.matrix) < 0).any():
            raise CareHubError(f"this map has determinant -1 and no real power {t}; fit it with special=True.")
        flat = self.matrix.reshape(-1, self.d, self.d)
        return Rotation(_orthogonal(torch.stack([_power(m, t) for m in flat]).reshape(self.matrix.shape)), self.encoder)

    def residual(self, z, z_t) -> float:
        """Mean |z_t - R z|^2 over (N, d) embeddings."""
        z, z_t = torch.as_tensor(z), torch.as_tensor(z_t)
        return (z_t.double() - self(z.double())).square().sum(dim=-1).mean().item()

    def check(self, encoder) -> None:
        """Raise CareHubError if `encoder` (see `fingerprint_of`) is known not to be whose embeddings this rotation was fitted on."""
        other = fingerprint_of(encoder)
        if None not in (self.encoder, other) and self.encoder != other:
            raise CareHubError("this rotation was fitted on embeddings of another encoder; fit it anew.")

    def save(self, path: str | Path) -> Path:
        from safetensors.torch import save_file

        save_file({"rotation": self.matrix.cpu().contiguous()}, path, metadata={"format": "pt", "encoder": self.encoder or ""})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Rotation":
        """Raises CareHubError if the file is missing, cut short, or holds no orthogonal matrix."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                return cls(file.get_tensor("rotation"), (file.metadata() or {}).get("encoder") or None)
        except (OSError, SafetensorError) as error:
            raise CareHubError(f"'{path}' is not a rotation saved by care_hub ({error}).") from error


def fingerprint_of(encoder) -> str | None:
    """The fingerprint of an Encoder, of a file that `care-hub embed` wrote (.parquet or .safetensors; None if it does not say),
    or the fingerprint itself."""
    path = Path(encoder) if isinstance(encoder, str | Path) else None
    if path is None or path.suffix not in (".parquet", ".safetensors"):
        return getattr(encoder, "fingerprint", encoder)
    import pyarrow.parquet as pq
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".parquet":
            return {k.decode(): v.decode() for k, v in (pq.read_schema(path).metadata or {}).items()}.get("encoder")
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("encoder")
    except (OSError, ValueError, SafetensorError) as error:  # pyarrow's own errors are ValueErrors
        raise CareHubError(f"'{path}' is not a file of embeddings ({error}).") from error


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, so that long products do not drift."""
    u, _, vh = torch.linalg.svd(matrix)
    return u @ vh


def _power(r: Tensor, t: float) -> Tensor:
    eye = torch.eye(len(r), dtype=r.dtype, device=r.device)
    _, size, vh = torch.linalg.svd(r + eye)
    half = vh[size < NEAR_HALF_TURN].T  # (d, k), k even: where R = -1
    cayley = torch.linalg.solve(eye + r + 2 * half @ half.T, eye - r - 2 * half @ half.T, left=False)
    tangent, v = torch.linalg.eigh(1j * cayley)
    powered = ((v * torch.exp(2j * t * torch.atan(tangent))) @ v.conj().T).real
    c, s = math.cos(math.pi * t), math.sin(math.pi * t)
    turn = torch.kron(torch.eye(half.shape[1] // 2, dtype=r.dtype), torch.tensor([[c, -s], [s, c]], dtype=r.dtype)).to(r.device)
    return powered @ (eye - half @ half.T + half @ turn @ half.T)

"""The embedded data set: ten shapes in eight colors, made from a seed, the same bytes on every machine.

Only +, -, *, / on float64, comparisons and NumPy's frozen legacy generator are used: no sine, no BLAS,
nothing whose last bit depends on the processor.
"""

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image

from ..errors import CareHubError

if TYPE_CHECKING:
    import datasets

Factors: TypeAlias = dict[str, np.ndarray]  # each (N,), by name
Points: TypeAlias = list[tuple[float, float]]

SHAPES = ("circle", "ring", "crescent", "triangle", "square", "bar", "plus", "star", "heart", "arrow")
COLORS = {
    "red": (214, 48, 49),
    "orange": (240, 147, 43),
    "yellow": (241, 215, 60),
    "green": (46, 160, 67),
    "cyan": (34, 193, 195),
    "blue": (45, 85, 215),
    "purple": (136, 65, 190),
    "pink": (240, 110, 170),
}
SIDE = 32  # pixels
SIZES = {"train": 5000, "test": 2000}
_FINE = 4  # sample points per pixel side

# Corners in the unit disk, x to the right, y down.
_POLYGONS: dict[str, Points] = {
    "star": [
        (0.0, -1.0), (0.2245, -0.309), (0.9511, -0.309), (0.3633, 0.118), (0.5878, 0.809),
        (0.0, 0.382), (-0.5878, 0.809), (-0.3633, 0.118), (-0.9511, -0.309), (-0.2245, -0.309),
    ],
    "arrow": [
        (0.0, -1.0), (0.75, -0.1), (0.28, -0.1), (0.28, 0.95), (-0.28, 0.95), (-0.28, -0.1), (-0.75, -0.1),
    ],
}  # fmt: skip


def _polygon(x: np.ndarray, y: np.ndarray, corners: Points) -> np.ndarray:
    """Whether points lie in a polygon, by the even-odd rule."""
    inside = np.zeros(np.broadcast(x, y).shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < (y - y0) * ((x1 - x0) / (y1 - y0)) + x0)
    return inside


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points of the shape's own plane (unit disk) belong to it."""
    ax, ay = np.abs(x), np.abs(y)
    square = x * x + y * y
    if shape == "circle":
        return square < 0.8
    if shape == "ring":
        return (square < 0.95) & (square > 0.36)
    if shape == "crescent":
        return (square < 0.95) & ((x - 0.45) * (x - 0.45) + y * y > 0.6)
    if shape == "triangle":
        return (y < 0.55) & (y > 1.8 * ax - 1.0)
    if shape == "square":
        return (ax < 0.7) & (ay < 0.7)
    if shape == "bar":
        return (ax < 0.28) & (ay < 0.95)
    if shape == "plus":
        return ((ax < 0.27) & (ay < 0.9)) | ((ay < 0.27) & (ax < 0.9))
    if shape == "heart":
        lobes = (ax - 0.42) * (ax - 0.42) + (y + 0.32) * (y + 0.32) < 0.2
        return lobes | ((y > -0.32) & (y < 0.9 - 1.42 * ax)) | ((ax < 0.42) & (y > -0.32) & (y < 0.2))
    return _polygon(x, y, _POLYGONS[shape])


def factors(n: int, seed: int) -> Factors:
    """What each of `n` images shows.

    label, color (indices), x, y (center, pixels), size (radius, pixels), rotation (degrees,
    counter-clockwise, up to 30 either way), background (gray level).

    >>> SHAPES[factors(1, seed=0)["label"][0]]
    'bar'
    """
    if n < 0 or not 0 <= seed < 2**32:
        raise CareHubError(f"there are no {n} shapes of seed {seed}; seeds go from 0 to 2^32 - 1.")
    u = np.random.RandomState(seed).random_sample((n, 7))
    size = 9 + 4 * u[:, 2]
    room = SIDE - 2 * size
    return {
        "label": (u[:, 0] * len(SHAPES)).astype(np.int64),
        "color": (u[:, 1] * len(COLORS)).astype(np.int64),
        "size": size,
        "x": size + room * u[:, 3],
        "y": size + room * u[:, 4],
        "rotation": 60 * u[:, 5] - 30,
        "background": (60 + 140 * u[:, 6]).astype(np.int64),
    }


def _sine_cosine(degrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By power series in exact order of operations: libm's last bit differs between machines."""
    angle = degrees * (3.141592653589793 / 180) / 4
    square = angle * angle
    sine = angle * (1 - square / 6 * (1 - square / 20 * (1 - square / 42 * (1 - square / 72))))
    cosine = 1 - square / 2 * (1 - square / 12 * (1 - square / 30 * (1 - square / 56)))
    for _ in range(2):
        sine, cosine = 2 * sine * cosine, cosine * cosine - sine * sine
    return sine, cosine


def render(f: Factors) -> np.ndarray:
    """The images of `factors`: (N, 32, 32, 3) uint8.

    >>> render(factors(2, seed=0)).shape
    (2, 32, 32, 3)
    """
    n = len(f["label"])
    out = np.empty((n, SIDE, SIDE, 3), dtype=np.uint8)
    for start in range(0, n, 100):  # so that little memory is used
        for label, shape in enumerate(SHAPES):
            rows = start + np.flatnonzero(f["label"][start : start + 100] == label)
            out[rows] = _render_shape(shape, {name: values[rows, None, None] for name, values in f.items()})
    return out


def _render_shape(shape: str, f: Factors) -> np.ndarray:
    """Images that all show `shape`, antialiased: the share of a pixel's sample points that it covers.

    The factors are (N, 1, 1), which goes with (N, rows, columns).
    """
    grid = (np.arange(SIDE * _FINE) + 0.5) / _FINE
    dx, dy = (grid - f["x"]) / f["size"], (grid[:, None] - f["y"]) / f["size"]
    sine, cosine = _sine_cosine(f["rotation"])
    mask = _inside(shape, cosine * dx - sine * dy, sine * dx + cosine * dy)
    cover = mask.reshape(-1, SIDE, _FINE, SIDE, _FINE).sum(axis=(2, 4))[..., None]
    front = np.array(list(COLORS.values()))[f["color"]]
    back = f["background"][..., None]
    total = _FINE**2
    return (back * (total - cover) + front * cover + total // 2) // total


def split_factors(split: str = "train", seed: int = 0) -> Factors:
    """`factors` of the 5,000 training or 2,000 test images."""
    if split not in SIZES:
        raise CareHubError(f"there is no split '{split}'; choose 'train' or 'test'.")
    return factors(SIZES[split], seed * 2 + (split == "test"))


def make(split: str = "train", seed: int = 0) -> "datasets.Dataset":
    """The split as a `datasets.Dataset`: image, label (shape), color, and the other factors as numbers."""
    import datasets

    f = split_factors(split, seed)
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=list(SHAPES)),
        "color": datasets.ClassLabel(names=list(COLORS)),
        **{name: datasets.Value("float32") for name in ("x", "y", "size", "rotation", "background")},
    }
    images = [Image.fromarray(image) for image in render(f)]
    columns = {"image": images, **{name: f[name] for name in features if name in f}}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

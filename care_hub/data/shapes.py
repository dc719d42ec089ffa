"""The embedded data set: ten shapes in eight colours, made from a seed, the same bytes on every machine.

Only +, -, *, / on float64, comparisons and NumPy's frozen legacy generator are used: no sine, no BLAS, nothing whose
last bit depends on the processor.
"""

import numpy as np

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
_STAR = [
    (0.0, -1.0), (0.2245, -0.309), (0.9511, -0.309), (0.3633, 0.118), (0.5878, 0.809),
    (0.0, 0.382), (-0.5878, 0.809), (-0.3633, 0.118), (-0.9511, -0.309), (-0.2245, -0.309),
]  # fmt: skip
_ARROW = [(0.0, -1.0), (0.75, -0.1), (0.28, -0.1), (0.28, 0.95), (-0.28, 0.95), (-0.28, -0.1), (-0.75, -0.1)]


def _polygon(x, y, corners):
    """Even-odd rule."""
    inside = np.zeros(np.broadcast(x, y).shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < (y - y0) * ((x1 - x0) / (y1 - y0)) + x0)
    return inside


def _inside(shape: str, x, y):
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
    if shape == "star":
        return _polygon(x, y, _STAR)
    if shape == "heart":
        lobes = (ax - 0.42) * (ax - 0.42) + (y + 0.32) * (y + 0.32) < 0.2
        return lobes | ((y > -0.32) & (y < 0.9 - 1.42 * ax)) | ((ax < 0.42) & (y > -0.32) & (y < 0.2))
    return _polygon(x, y, _ARROW)


def factors(n: int, seed: int) -> dict[str, np.ndarray]:
    """What is drawn in each picture: label, color (indices), x, y (centre, pixels), size (radius, pixels),
    rotation (degrees, counter-clockwise, up to 30 either way), background (grey level)."""
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


def _sine_cosine(degrees):
    """By power series in exact order of operations: libm's last bit differs between machines."""
    angle = degrees * (3.141592653589793 / 180) / 4
    square = angle * angle
    sine = angle * (1 - square / 6 * (1 - square / 20 * (1 - square / 42 * (1 - square / 72))))
    cosine = 1 - square / 2 * (1 - square / 12 * (1 - square / 30 * (1 - square / 56)))
    for _ in range(2):
        sine, cosine = 2 * sine * cosine, cosine * cosine - sine * sine
    return sine, cosine


def render(f: dict[str, np.ndarray]) -> np.ndarray:
    """Factors -> (N, 32, 32, 3) uint8."""
    n = len(f["label"])
    out = np.empty((n, SIDE, SIDE, 3), dtype=np.uint8)
    grid = (np.arange(SIDE * _FINE) + 0.5) / _FINE
    palette = np.array(list(COLORS.values()), dtype=np.int64)
    total = _FINE * _FINE
    for start in range(0, n, 100):
        for label, shape in enumerate(SHAPES):
            rows = start + np.flatnonzero(f["label"][start : start + 100] == label)
            if not len(rows):
                continue
            sine, cosine = (v[:, None, None] for v in _sine_cosine(f["rotation"][rows]))
            size = f["size"][rows][:, None, None]
            dx = (grid[None, None, :] - f["x"][rows][:, None, None]) / size
            dy = (grid[None, :, None] - f["y"][rows][:, None, None]) / size
            mask = _inside(shape, cosine * dx - sine * dy, sine * dx + cosine * dy)
            cover = mask.reshape(len(rows), SIDE, _FINE, SIDE, _FINE).sum(axis=(2, 4))[..., None]
            front = palette[f["color"][rows]][:, None, None, :]
            back = f["background"][rows][:, None, None, None]
            out[rows] = (back * (total - cover) + front * cover + total // 2) // total
    return out


def split_factors(split: str = "train", seed: int = 0) -> dict[str, np.ndarray]:
    """`factors` of the 5,000 training or 2,000 test pictures."""
    return factors(SIZES[split], seed * 2 + (split == "test"))


def make(split: str = "train", seed: int = 0):
    """The split as a `datasets.Dataset`: image, label (shape), color, and the other factors as numbers."""
    from datasets import ClassLabel, Dataset, Features, Image, Value
    from PIL import Image as Picture

    f = split_factors(split, seed)
    pictures = [Picture.fromarray(p) for p in render(f)]
    columns = {"image": Image(), "label": ClassLabel(names=list(SHAPES)), "color": ClassLabel(names=list(COLORS))}
    numbers = ("x", "y", "size", "rotation", "background")
    features = Features(columns | {k: Value("float32") for k in numbers})
    data = {"image": pictures, "label": f["label"], "color": f["color"]}
    return Dataset.from_dict(data | {k: f[k].astype(np.float32) for k in numbers}, features=features)

"""Image transformations: those with a name and a strength, and the random families made of such.

One table for `care-hub rotations`, which fits a rotation to a transformation of a given strength, and for
`care-hub equivariance`, which samples random ones.
"""

import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import augment
from .errors import CareHubError, suggest

GRID = 49  # strengths that, with the unchanged image, are the 50 candidates of "same image"
SCALES = ("linear", "log", "switch")  # of strengths; a switch is on or off


def position(scale: str, strength: float) -> float:
    """Where a strength lies on its scale: equal steps of it are equally large changes.

    >>> position("log", 1.0), position("linear", 0.5)
    (0.0, 0.5)
    """
    return math.log(strength) if scale == "log" else strength


@dataclass(frozen=True)
class Transformation:
    """An image transformation, the same for all images, whose strength is a number.

    >>> half_as_bright = TRANSFORMATIONS["brightness"](torch.full((1, 3, 2, 2), 0.5), 0.5)
    >>> half_as_bright.unique()
    tensor([0.2500])
    """

    name: str
    function: Callable[
        [Tensor, float], Tensor
    ]  # of (B, 3, S, S) floats in [0, 1], which it leaves as they are
    meaning: str  # of the strength
    neutral: float  # the strength that changes nothing
    low: float
    high: float
    strengths: tuple[float, ...]  # to which rotations are fitted by default
    scale: str = "linear"

    def __call__(self, x: Tensor, strength: float) -> Tensor:
        """(B, 3, S, S) floats in [0, 1] -> the same. Raises CareHubError for a strength that can't be."""
        self.check(strength)
        return x if strength == self.neutral else self.function(x, strength)

    def check(self, strength: float) -> None:
        """Raise CareHubError for a strength that this transformation does not have."""
        if self.scale == "switch" and strength not in (self.low, self.high):
            found = f"is {self.low:g} (off) or {self.high:g} (on), not {strength:g}"
            raise CareHubError(f"the strength of {self.name} {found}.")
        if not self.low <= strength <= self.high:  # NaN is not
            found = f"from {self.low:g} to {self.high:g} ({self.meaning}), not {strength:g}"
            raise CareHubError(f"the strength of {self.name} goes {found}.")

    def toward(self, strength: float, t: float) -> float:
        """The strength at the part t of the way from the neutral one to `strength`, on its scale.

        >>> TRANSFORMATIONS["brightness"].toward(2.25, 0.5), TRANSFORMATIONS["flip"].toward(1, 0.5)
        (1.5, 1)
        """
        if self.scale == "switch" or t == 1:
            return strength if t else self.neutral
        if self.scale == "log":
            return self.neutral * (strength / self.neutral) ** t
        return self.neutral + (strength - self.neutral) * t

    def grid(self) -> tuple[float, ...]:
        """49 strengths at equal distances, without the neutral one; of a switch the one that is "on".

        Upwards one step more than downwards: so the two ends of the circle of hues are there once.

        >>> TRANSFORMATIONS["hue"].grid()[:2], len(TRANSFORMATIONS["blur"].grid())
        ((-0.48, -0.46), 49)
        """
        if self.scale == "switch":
            return (self.high,)
        above = GRID if self.low == self.neutral else 0 if self.high == self.neutral else (GRID + 1) // 2
        below = GRID - above
        down = [self.toward(self.low, k / max(above, below)) for k in range(below, 0, -1)]
        return tuple(down + [self.toward(self.high, k / max(above, below)) for k in range(1, above + 1)])


def _jitter(k: int) -> Callable[[Tensor, float], Tensor]:
    """Brightness, contrast, saturation or hue of `augment.jitter`."""

    def function(x: Tensor, strength: float) -> Tensor:
        order = torch.tensor([k, -1, -1, -1]).expand(len(x), 4)
        return augment.jitter(x, torch.full((len(x), 4), strength), order)

    return function


def _blur(x: Tensor, percent: float) -> Tensor:
    sigma = percent / 100 * x.shape[3]
    reach = min(math.ceil(3 * sigma), x.shape[3] - 1)  # beyond three sigma there is next to nothing
    return augment.blur(x, torch.full((len(x),), sigma), 2 * reach + 1)


def _grayscale(x: Tensor, on: float) -> Tensor:
    return augment.grayscale(x, torch.ones(len(x), dtype=torch.bool))


def _zoom(x: Tensor, zoom: float) -> Tensor:
    matrix = x.new_tensor([[1 / zoom, 0, 0], [0, 1 / zoom, 0]]).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(matrix, list(x.shape), align_corners=False), align_corners=False)


def _flip(x: Tensor, on: float) -> Tensor:
    return x.flip(3)


def _jpeg(x: Tensor, quality: float) -> Tensor:
    """Encoded and decoded by Pillow, in threads."""

    def through_file(image: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=round(quality))
        return np.asarray(Image.open(file))

    pixels = (x * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
    with ThreadPoolExecutor() as pool:
        found = np.stack(list(pool.map(through_file, pixels)))
    return torch.from_numpy(found).permute(0, 3, 1, 2).to(x) / 255


def _gamma(x: Tensor, exponent: float) -> Tensor:
    return x**exponent


def _white_balance(x: Tensor, stops: float) -> Tensor:
    gains = x.new_tensor([2 ** (stops / 2), 1, 2 ** (-stops / 2)])
    return (x * gains.view(3, 1, 1)).clamp_(0, 1)


_FACTORS = (0.5, 0.7, 1.4, 2.0)
_HUES = (-0.45, -0.3, -0.15, -0.075, 0.075, 0.15, 0.3, 0.45)
_COLORS, _DEGREES = (0.25, 0.5, 1.5, 2.0), (-30.0, -15.0, 15.0, 30.0)
_STOPS = (-1.0, -0.5, -0.25, 0.25, 0.5, 1.0)  # as near to each other as rotations in between need
_ROWS: tuple[
    tuple[Any, ...], ...
] = (  # name, function, meaning of the strength, neutral, low, high, default strengths, scale
    ("brightness", _jitter(0), "factor of all values", 1.0, 0.4, 2.5, _FACTORS, "log"),
    ("contrast", _jitter(1), "factor of the distance to the mean gray", 1.0, 0.4, 2.5, _FACTORS, "log"),
    ("saturation", _jitter(2), "factor of the distance to gray", 1.0, 0.0, 2.0, _COLORS, "linear"),
    ("hue", _jitter(3), "turns of the color circle", 0.0, -0.5, 0.5, _HUES, "linear"),
    ("blur", _blur, "sigma in percent of the side", 0.0, 0.0, 8.0, (2.0, 4.0, 8.0), "linear"),
    ("grayscale", _grayscale, "on or off", 0.0, 0.0, 1.0, (1.0,), "switch"),
    ("crop", _zoom, "zoom into the center", 1.0, 1.0, 2.0, (1.2, 1.5, 2.0), "log"),
    ("flip", _flip, "on or off", 0.0, 0.0, 1.0, (1.0,), "switch"),
    ("rotation", augment.rotate, "degrees, counter-clockwise", 0.0, -30.0, 30.0, _DEGREES, "linear"),
    ("jpeg", _jpeg, "JPEG quality", 100.0, 2.0, 100.0, (10.0, 20.0, 50.0), "linear"),
    ("gamma", _gamma, "exponent of all values", 1.0, 0.4, 2.5, _FACTORS, "log"),
    ("white_balance", _white_balance, "stops from blue to red", 0.0, -1.0, 1.0, _STOPS, "linear"),
)
TRANSFORMATIONS = {name: Transformation(name, *rest) for name, *rest in _ROWS}

# What `care-hub equivariance` samples at random: options of `AugmentationConfig` that differ from nothing.
FAMILIES: dict[str, dict[str, Any]] = {
    "crop": {"scale": (0.4, 1.0), "ratio": (3 / 4, 4 / 3)},
    "flip": {"flip": 1.0},
    "jitter 0.2": {"jitter": (0.2, 0.2, 0.2, 0.0), "jitter_p": 1.0},
    "jitter 0.4": {"jitter": (0.4, 0.4, 0.4, 0.0), "jitter_p": 1.0},
    "jitter 0.8": {"jitter": (0.8, 0.8, 0.8, 0.0), "jitter_p": 1.0},
    "hue": {"jitter": (0.0, 0.0, 0.0, TRANSFORMATIONS["hue"].high), "jitter_p": 1.0},
    "color": {"jitter": (0.4, 0.4, 0.4, 0.5), "jitter_p": 1.0},  # as a whole
    "grayscale": {"grayscale": 1.0},
    "blur": {"blur": 1.0},
    "rotation": {},  # of the image, up to MAX_DEGREES either way
    "full recipe": {},  # the augmentation of training
}
NOT_RANDOM = {
    name for name in FAMILIES if name in TRANSFORMATIONS and TRANSFORMATIONS[name].scale == "switch"
}
MAX_DEGREES = TRANSFORMATIONS["rotation"].high


def chain(parts: Sequence[tuple[Transformation, float]]) -> Transformation:
    """Several transformations, first to last, as one whose strength is the share of each of theirs.

    >>> both = chain([(TRANSFORMATIONS["brightness"], 2.25), (TRANSFORMATIONS["flip"], 1)])
    >>> both.name, both(torch.full((1, 3, 2, 2), 0.2), 0.5).unique()
    ('brightness=2.25+flip=1', tensor([0.3000]))
    """

    def function(x: Tensor, t: float) -> Tensor:
        for part, strength in parts:
            x = part(x, part.toward(strength, t))
        return x

    name = "+".join(f"{part.name}={strength:g}" for part, strength in parts)
    return Transformation(name, function, "share of the whole", 0.0, 0.0, 1.0, (1.0,), "linear")


def parse(text: str) -> tuple[Transformation, tuple[float, ...]]:
    """What a user asks for: a transformation and strengths of it, ascending.

    "brightness" has strengths of its own, "brightness=0.5,2" those; "brightness=1.4+blur=4" is a
    `chain`. Raises CareHubError for an unknown transformation and for strengths that can't be.

    >>> parse("brightness=2,0.5")[1], parse("brightness=1.4+blur=4")[0].name
    ((0.5, 2.0), 'brightness=1.4+blur=4')
    """
    parts = [_parse_one(part) for part in text.split("+")]
    if len(parts) == 1:
        return parts[0]
    if any(len(strengths) > 1 for _, strengths in parts):
        raise CareHubError(f"in the chain '{text}' each transformation has one strength, as in 'hue=0.1'.")
    whole = chain([(part, strengths[0]) for part, strengths in parts])
    return whole, whole.strengths


def _parse_one(text: str) -> tuple[Transformation, tuple[float, ...]]:
    name, sign, values = text.strip().partition("=")
    if name not in TRANSFORMATIONS:
        known = f"transformations are {', '.join(TRANSFORMATIONS)}"
        near = suggest(name, TRANSFORMATIONS) or ";"
        raise CareHubError(f"there is no transformation '{name}'{near} {known}.")
    transformation = TRANSFORMATIONS[name]
    if not sign:
        return transformation, transformation.strengths
    try:
        strengths = tuple(sorted({float(value) for value in values.split(",")}))
    except ValueError:
        raise CareHubError(f"'{text}' should look like '{name}=0.5,1.4', strengths as numbers.") from None
    for strength in strengths:
        transformation.check(strength)
        if strength == transformation.neutral:
            raise CareHubError(f"{name} of strength {strength:g} changes nothing; leave it out.")
    return transformation, strengths

"""JPEG files that cost as much to decode as photos do."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

DIFFERENT = 64  # all others are links to these


def make_photos(folder: Path, count: int, side: int) -> None:
    """Write `count` JPEGs of 4/3 `side` x `side` pixels with the spectrum of photos, roughly."""
    random = np.random.RandomState(0)
    for k in range(min(count, DIFFERENT)):
        image = sum(share * _noise(random, side, scale) for share, scale in ((0.6, 32), (0.3, 8), (0.1, 2)))
        Image.fromarray(np.asarray(image).astype(np.uint8)).save(folder / f"{k:06d}.jpg", quality=90)
    for k in range(DIFFERENT, count):
        os.link(folder / f"{k % DIFFERENT:06d}.jpg", folder / f"{k:06d}.jpg")


def _noise(random: np.random.RandomState, side: int, scale: int) -> np.ndarray:
    """Smooth noise with details of `scale` pixels."""
    width = side * 4 // 3
    small = random.randint(0, 256, (max(2, side // scale), max(2, width // scale), 3)).astype(np.uint8)
    resized = Image.fromarray(small).resize((width, side), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.float32)

"""The embedded data set is the same everywhere and contains what it says."""

import hashlib

import numpy as np
import pytest

from care_hub.data import shapes


def test_same_seed_same_bytes_on_every_machine():
    """The digest was taken once; a machine or NumPy version that renders another image fails here."""
    pixels = shapes.render(shapes.factors(300, 0))
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == "1dd023b7ad3f96f4"
    assert not np.array_equal(pixels, shapes.render(shapes.factors(300, 1)))


def test_factors_are_what_the_images_show():
    f = shapes.factors(400, 5)
    pixels = shapes.render(f).astype(int)
    palette = np.array(list(shapes.COLORS.values()))
    for k in np.flatnonzero(f["label"] == shapes.SHAPES.index("circle")):
        x, y = int(f["x"][k]), int(f["y"][k])
        assert (pixels[k, y, x] == palette[f["color"][k]]).all()
        corners = [(r, c) for r in (0, 31) for c in (0, 31)]
        farthest = max(corners, key=lambda p: (p[0] - y) ** 2 + (p[1] - x) ** 2)
        assert (pixels[k][farthest] == f["background"][k]).all()
        covered = (pixels[k] != f["background"][k]).any(axis=2).sum()
        assert abs(covered - np.pi * 0.8 * f["size"][k] ** 2) < 0.25 * covered


def test_positive_rotation_is_counter_clockwise():
    f = {name: np.repeat(values[:1], 2) for name, values in shapes.factors(1, 0).items()}
    f |= {"label": np.array([9, 9]), "size": np.array([12.0, 12.0])}
    f |= {"x": np.array([16.0, 16.0]), "y": np.array([16.0, 16.0]), "rotation": np.array([0.0, 90.0])}
    upright, turned = shapes.render(f)
    np.testing.assert_allclose(np.rot90(upright).astype(int), turned.astype(int), atol=1)


def test_dataset_has_both_labels_and_all_factors_balanced():
    data = shapes.make("test")
    assert len(data) == shapes.SIZES["test"] and data[0]["image"].size == (32, 32)
    assert data.features["label"].names == list(shapes.SHAPES)
    assert data.features["color"].names == list(shapes.COLORS)
    assert {"x", "y", "size", "rotation", "background"} <= set(data.column_names)
    assert np.bincount(data["label"]).min() > 0.07 * len(data)
    assert np.bincount(data["color"]).min() > 0.09 * len(data)
    train, test = (shapes.split_factors(split) for split in ("train", "test"))
    assert not np.array_equal(train["x"][:100], test["x"][:100])


@pytest.mark.parametrize("degrees", [-90.0, -37.5, 0.0, 61.0, 90.0])
def test_sine_and_cosine_are_accurate(degrees):
    sine, cosine = shapes._sine_cosine(np.array([degrees]))
    assert abs(sine[0] - np.sin(np.radians(degrees))) < 1e-7
    assert abs(cosine[0] - np.cos(np.radians(degrees))) < 1e-7

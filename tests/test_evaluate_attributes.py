"""Attribute probes find what is there and nothing else."""

from types import SimpleNamespace

import torch

from care_hub.data.images import InMemoryImages
from care_hub.evaluate.attributes import attribute_targets, fit_ridge, probe_attributes, probe_numbers


class ColorEncoder:
    """Knows mean colors only, and no place."""

    device, projection = torch.device("cpu"), None
    config = SimpleNamespace(image_size=8)

    def embed(self, x, space):
        return x.float().mean(dim=(2, 3))


def test_probes_find_what_is_there_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(600, 10, generator=g), torch.randn(600, 1, generator=g)
    told = torch.cat([x, 3 * y + 0.1 * torch.randn(600, 1, generator=g)], dim=1)
    assert probe_numbers(told[:400], y[:400], told[400:], y[400:]) > 0.99
    assert probe_numbers(x[:400], y[:400], x[400:], y[400:]) < 0.05
    weight, bias = (values[0] for values in fit_ridge(told, y, [1e-9]))
    columns = torch.cat([told, torch.ones(600, 1)], dim=1).double()
    exact = torch.linalg.lstsq(columns, y.double()).solution.T
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], dim=1), exact, rtol=1e-4, atol=1e-6)
    wide = torch.cat([x[:20], torch.zeros(20, 30)], dim=1)  # more features than images
    weights, _ = fit_ridge(wide, y[:20], [0.1, 10])
    torch.testing.assert_close(weights[..., :10], fit_ridge(x[:20], y[:20], [0.1, 10])[0])


def test_colors_of_images_are_read_from_colors():
    """Mean colors determine brightness and hue exactly, and nothing of the contrast within an image."""
    base = torch.randint(40, 216, (300, 3, 1, 1), generator=torch.Generator().manual_seed(1))
    detail = torch.randint(-40, 40, (300, 3, 8, 8), generator=torch.Generator().manual_seed(2))
    images = InMemoryImages(8, None, None, (base + detail).byte())
    classes, numbers = attribute_targets(images)
    assert not classes and numbers["hue"].shape == (300, 2)
    half, state = torch.arange(150), torch.get_rng_state()
    results = probe_attributes(ColorEncoder(), images.take(half), images.take(half + 150))
    assert set(results) == {"backbone"}
    read = results["backbone"]
    assert read["brightness"] > 0.999 and read["hue"] > 0.999 and read["contrast"] < 0.5
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_labels_are_not_probed():
    pixels = torch.randint(0, 256, (60, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    pixels[::2, 0] = 255
    labels = torch.arange(60) % 2
    known = InMemoryImages(8, labels, ["red", "gray"], pixels)
    partly = InMemoryImages(8, labels.masked_fill(torch.arange(60) < 20, -1), ["red", "gray"], pixels)
    unknown = InMemoryImages(8, torch.full((60,), -1), None, pixels)
    assert probe_attributes(ColorEncoder(), partly, known)["backbone"]["label"] == 100
    assert "label" not in probe_attributes(ColorEncoder(), unknown, known)["backbone"]
    assert "label" not in probe_attributes(ColorEncoder(), known, unknown)["backbone"]

"""Augmentation on the batch is torchvision's, image by image, and its parameters are shared as CARE needs."""

import dataclasses

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from care_hub import augment
from care_hub.augment import Recipe

TOLERANCE = 2e-6


def pictures(n=8, height=32, width=32, seed=0):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("size", "height", "width"), [(32, 32, 32), (24, 50, 37), (64, 30, 45)])
def test_crop_equals_torchvision_resized_crop(size, height, width):
    x = pictures(16, height, width)
    d = augment.draw(Recipe(size=size), 16, height, width, augment.generator(1))
    y = augment.crop(x, d.box, d.flip, size)
    for k in range(16):
        top, left, h, w = d.box[k].tolist()
        expected = tv.resized_crop(x[k], top, left, h, w, [size, size], InterpolationMode.BILINEAR, antialias=True)
        expected = tv.hflip(expected) if d.flip[k] else expected
        torch.testing.assert_close(y[k], expected.clamp(0, 1), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("column", range(4))
def test_each_colour_operation_equals_torchvision(column):
    x = pictures()
    x[0, 1] = x[0, 0]  # ties between channels
    x[1] = x[1, :1]  # grey
    function = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)[column]
    values = torch.linspace(-0.5, 0.5, 8) if column == 3 else torch.linspace(0.2, 1.8, 8)
    operation = (augment._brightness, augment._contrast, augment._saturation, augment._hue)[column]
    y = operation(x, values.view(-1, 1, 1, 1))
    for k in range(8):
        torch.testing.assert_close(y[k], function(x[k], values[k].item()), rtol=0, atol=TOLERANCE)


def test_jitter_applies_the_operations_in_each_images_own_order():
    x, d = pictures(24), augment.draw(Recipe(), 24, 32, 32, augment.generator(2))
    y = augment.jitter(x, d.factors, d.order)
    functions = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    assert len({tuple(o) for o in d.order.tolist()}) > 8 and (d.order == -1).any()
    for k in range(24):
        expected = x[k]
        for which in d.order[k].tolist():
            expected = functions[which](expected, d.factors[k, which].item()) if which >= 0 else expected
        torch.testing.assert_close(y[k], expected, rtol=0, atol=5 * TOLERANCE)  # four operations in a row


@pytest.mark.parametrize("taps", [3, 5])
def test_blur_and_greyscale_equal_torchvision(taps):
    x = pictures()
    sigma = torch.tensor([0, 0.1, 0.5, 0.9, 1.3, 1.7, 2.0, 0])
    y = augment.blur(x, sigma, taps)
    grey = augment.greyscale(x, torch.arange(8) % 2 == 0)
    for k in range(8):
        expected = tv.gaussian_blur(x[k], [taps, taps], [sigma[k].item()] * 2) if sigma[k] > 0 else x[k]
        torch.testing.assert_close(y[k], expected, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(grey[k], tv.rgb_to_grayscale(x[k], 3) if k % 2 == 0 else x[k], rtol=0, atol=TOLERANCE)


def test_a_group_shares_one_augmentation_and_groups_differ():
    one = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = augment.pair(one.expand(12, -1, -1, -1), Recipe(), seed=0, step=3, stream="equivariance", draws=3)
    first, second = views.chunk(2)
    for view in (first, second):
        groups = view.view(3, 4, -1)
        assert torch.equal(groups, groups[:, :1].expand_as(groups))
        assert not torch.allclose(groups[0, 0], groups[1, 0]) and not torch.allclose(groups[1, 0], groups[2, 0])
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("draws", [1, 4, 16])
def test_the_view_of_an_image_depends_on_its_place_in_the_global_batch_and_not_on_the_process(draws):
    x = torch.randint(0, 256, (16, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = augment.pair(x, Recipe(size=16), 0, 7, "s", draws).chunk(2)
    for rank, part in enumerate(x.chunk(4)):
        views = augment.pair(part, Recipe(size=16), 0, 7, "s", draws, rank, 4).chunk(2)
        for a, b in zip(whole, views, strict=True):
            torch.testing.assert_close(a.chunk(4)[rank], b, rtol=0, atol=1e-6)


def test_draws_are_reproducible_and_differ_by_step_and_seed():
    def drawn(*path):
        return augment.draw(Recipe(), 4, 32, 32, augment.generator(*path))

    def same(a, b):
        return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))

    assert same(drawn(0, "x", 1), drawn(0, "x", 1))
    assert not same(drawn(0, "x", 1), drawn(0, "x", 2)) and not same(drawn(0, "x", 1), drawn(1, "x", 1))


def test_draws_follow_the_recipe():
    recipe = Recipe(scale=(0.2, 0.6))
    d = augment.draw(recipe, 20000, 100, 100, augment.generator(0))
    area = (d.box[:, 2] * d.box[:, 3]).double() / 1e4
    ratio = d.box[:, 3].double() / d.box[:, 2]
    assert area.min() > 0.19 and area.max() < 0.61 and abs(area.mean() - 0.4) < 0.01
    assert ratio.min() > 0.73 and ratio.max() < 1.37
    assert (d.box[:, 0] + d.box[:, 2]).max() <= 100 and (d.box[:, 1] + d.box[:, 3]).max() <= 100
    rates = {"flip": (d.flip, 0.5), "grey": (d.grey, 0.2), "blur": (d.sigma > 0, 0.5), "jitter": (d.order[:, 0] >= 0, 0.8)}
    for name, (happened, p) in rates.items():
        assert abs(happened.double().mean() - p) < 0.015, name
    assert d.factors[:, :3].min() >= 0.6 and d.factors[:, :3].max() <= 1.4 and d.factors[:, 3].abs().max() <= 0.1


def test_a_crop_that_never_fits_becomes_the_central_one():
    d = augment.draw(Recipe(scale=(1.0, 1.0), ratio=(1.0, 1.0)), 3, 20, 50, augment.generator(0))
    assert d.box.tolist() == [[0, 15, 20, 20]] * 3

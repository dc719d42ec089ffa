"""Augmentation of the batch is torchvision's, image by image, and its parameters are shared as CARE needs."""

import dataclasses
import math

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from care_hub import augment
from care_hub.augment import AugmentationConfig, seeded_generator
from care_hub.errors import CareHubError

TOLERANCE = 2e-6
COLOR_OPERATIONS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def images(n=8, height=32, width=32):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0))


def pixels(n, size):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def assert_near(found, expected, atol=TOLERANCE):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("size", "height", "width"), [(32, 32, 32), (24, 50, 37), (64, 30, 45)])
def test_crop_equals_torchvision_resized_crop(size, height, width):
    x = images(16, height, width)
    params = augment.sample(AugmentationConfig(size=size), 16, height, width, seeded_generator(1))
    y = augment.crop(x, params.box, params.flip, size)
    for k, box in enumerate(params.box.tolist()):
        expected = tv.resized_crop(x[k], *box, [size, size], InterpolationMode.BILINEAR, antialias=True)
        expected = tv.hflip(expected) if params.flip[k] else expected
        assert_near(y[k], expected.clamp(0, 1))


@pytest.mark.parametrize("column", range(4))
def test_each_color_operation_equals_torchvision(column):
    x = images()
    x[0, 1] = x[0, 0]  # ties between channels
    x[1] = x[1, :1]  # gray
    values = torch.linspace(-0.5, 0.5, 8) if column == 3 else torch.linspace(0.2, 1.8, 8)
    order = torch.tensor([column, -1, -1, -1]).expand(8, 4)
    y = augment.jitter(x, values[:, None].expand(8, 4), order)
    for k in range(8):
        assert_near(y[k], COLOR_OPERATIONS[column](x[k], values[k].item()))


def test_a_shared_jitter_is_that_of_each_image_and_neutral_factors_change_nothing():
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    factors, order = torch.tensor([[1.3, 0.7, 1.2, 0.1], [1, 1, 1, 0]]), torch.tensor([[2, 0, 3, 1]])
    shared = augment.jitter(x, factors[:1].expand(4, 4), order.expand(4, 4))
    both = augment.jitter(x.repeat(2, 1, 1, 1), factors.repeat_interleave(4, dim=0), order.expand(8, 4))
    assert torch.equal(both, torch.cat([shared, x])) and not torch.allclose(shared, x, atol=0.1)


def test_jitter_applies_the_operations_in_each_images_own_order():
    x, params = images(24), augment.sample(AugmentationConfig(), 24, 32, 32, seeded_generator(2))
    y = augment.jitter(x, params.factors, params.order)
    orders = params.order.tolist()
    assert len(set(map(tuple, orders))) > 8 and [-1] * 4 in orders
    for k in range(24):
        expected = x[k]
        for operation in orders[k]:
            if operation >= 0:
                factor = params.factors[k, operation].item()
                expected = COLOR_OPERATIONS[operation](expected, factor)
        assert_near(y[k], expected, atol=5 * TOLERANCE)  # four operations in a row


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_blur_equals_torchvision(kernel_size):
    x, sigma = images(), torch.tensor([0, 0.1, 0.5, 0.9, 1.3, 1.7, 2.0, 0])
    y = augment.blur(x, sigma, kernel_size)
    for k in range(8):
        blurred = sigma[k] > 0
        expected = tv.gaussian_blur(x[k], [kernel_size] * 2, [sigma[k].item()] * 2) if blurred else x[k]
        assert_near(y[k], expected)


def test_grayscale_equals_torchvision():
    x = images()
    y = augment.grayscale(x, torch.arange(8) % 2 == 0)
    for k in range(8):
        assert_near(y[k], tv.rgb_to_grayscale(x[k], 3) if k % 2 == 0 else x[k])


def test_a_group_shares_one_augmentation_and_groups_differ():
    one = pixels(1, 32).expand(12, -1, -1, -1)
    views = augment.two_views(one, AugmentationConfig(), seed=0, step=3, stream="equivariance", draws=3)
    first, second = views.chunk(2)
    for view in (first, second):
        groups = view.view(3, 4, -1)
        assert torch.equal(groups, groups[:, :1].expand_as(groups))
        assert not torch.allclose(groups[0], groups[1]) and not torch.allclose(groups[1], groups[2])
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("draws", [1, 4, 16])
def test_a_view_depends_on_the_place_in_the_global_batch_and_not_on_the_process(draws):
    x, config = pixels(16, 20), AugmentationConfig(size=16)
    whole = augment.two_views(x, config, 0, 7, "s", draws).chunk(2)
    for rank, part in enumerate(x.chunk(4)):
        views = augment.two_views(part, config, 0, 7, "s", draws, rank, 4).chunk(2)
        for a, b in zip(whole, views, strict=True):
            assert_near(a.chunk(4)[rank], b, atol=1e-6)


def test_views_that_are_made_together_are_those_that_are_made_alone():
    kinds = AugmentationConfig(size=16), AugmentationConfig(size=16, jitter_p=1, blur=0, flip=0)
    params = [augment.sample(kind, 8, 20, 20, seeded_generator(k)) for k, kind in enumerate(kinds)]
    parts = list(zip((pixels(8, 20), pixels(8, 20).flip(0)), params, kinds, strict=True))
    together = augment.apply_each(parts)
    assert all(torch.equal(view, augment.apply(*part)) for view, part in zip(together, parts, strict=True))
    with pytest.raises(CareHubError, match="different sizes"):
        augment.apply_each([parts[0], (*parts[1][:2], AugmentationConfig(size=12))])


def test_parameters_are_reproducible_and_differ_by_step_and_seed():
    def sampled(*path):
        return augment.sample(AugmentationConfig(), 4, 32, 32, seeded_generator(*path))

    def same(a, b):
        return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))

    assert same(sampled(0, "x", 1), sampled(0, "x", 1))
    assert not same(sampled(0, "x", 1), sampled(0, "x", 2))
    assert not same(sampled(0, "x", 1), sampled(1, "x", 1))


def test_parameters_are_made_of_random_numbers_in_a_fixed_order():
    """Runs are reproduced from their seed, by every version."""
    config, numbers = AugmentationConfig(), seeded_generator(5, "order")
    brightness, contrast, saturation, hue = (torch.rand(6, generator=numbers) for _ in range(4))
    order, jittered = torch.rand(6, 4, generator=numbers), torch.rand(6, generator=numbers)
    sigma, blurred = torch.rand(2, 6, generator=numbers)
    area, ratio = torch.rand(2, 6, 10, generator=numbers)
    place, flip, gray = (torch.rand(k, 6, generator=numbers) for k in (2, 1, 1))
    found = augment.sample(config, 6, 50, 60, seeded_generator(5, "order"))
    factors = [0.6 + 0.8 * brightness, 0.6 + 0.8 * contrast, 0.6 + 0.8 * saturation, 0.2 * hue - 0.1]
    assert_near(found.factors, torch.stack(factors, dim=1))
    assert torch.equal(found.order, order.argsort(dim=1).where(jittered[:, None] < 0.8, -1))
    assert_near(found.sigma, (0.1 + 1.9 * sigma).where(blurred < 0.5, 0))
    assert torch.equal(found.flip, flip[0] < 0.5) and torch.equal(found.gray, gray[0] < 0.2)
    for k, (top, left, height, width) in enumerate(found.box.tolist()):
        sides = (3000 * (0.08 + 0.92 * area[k])).sqrt()[:, None]
        stretch = (math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratio[k]).div(2).exp()[:, None]
        tries = torch.cat([sides / stretch, sides * stretch], dim=1).round().tolist()
        assert [height, width] == next([h, w] for h, w in tries if 0 < h <= 50 and 0 < w <= 60)
        assert [top, left] == [int((50 - height + 1) * place[0, k]), int((60 - width + 1) * place[1, k])]


def test_parameters_follow_the_config():
    config = AugmentationConfig(scale=(0.2, 0.6))
    params = augment.sample(config, 20000, 100, 100, seeded_generator(0))
    top, left, height, width = params.box.T
    area, ratio = (height * width).double() / 1e4, width.double() / height
    assert area.min() > 0.19 and area.max() < 0.61 and abs(area.mean() - 0.4) < 0.01
    assert ratio.min() > 0.73 and ratio.max() < 1.37
    assert (top + height).max() <= 100 and (left + width).max() <= 100
    rates = {
        "flip": (params.flip, 0.5),
        "gray": (params.gray, 0.2),
        "blur": (params.sigma > 0, 0.5),
        "jitter": (params.order[:, 0] >= 0, 0.8),
    }
    for name, (happened, p) in rates.items():
        assert abs(happened.double().mean() - p) < 0.015, name
    factors, hue = params.factors[:, :3], params.factors[:, 3]
    assert factors.min() >= 0.6 and factors.max() <= 1.4 and hue.abs().max() <= 0.1


def test_a_crop_that_never_fits_becomes_the_central_one():
    config = AugmentationConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    params = augment.sample(config, 3, 20, 50, seeded_generator(0))
    assert params.box.tolist() == [[0, 15, 20, 20]] * 3

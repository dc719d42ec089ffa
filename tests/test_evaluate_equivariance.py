"""What rotates and what does not: encoders whose answer is known, and augmentations that do what they say."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from care_hub import augment
from care_hub.augment import AugmentationConfig
from care_hub.config import TrainConfig
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.evaluate.equivariance import (
    FAMILIES,
    augmentations,
    measure_equivariance,
)
from care_hub.evaluate.features import recorded_augmentation


class PixelEncoder:
    """Embeds an image as its own numbers: whatever moves pixels about is an orthogonal map."""

    device = torch.device("cpu")

    projection = None

    def evaluating(self):
        return self

    def embed(self, x, space="projection"):
        return F.normalize((x if x.dtype != torch.uint8 else x / 255).flatten(1) - 0.5, dim=1)


class ColorEncoder(PixelEncoder):
    """Knows mean colors only, and no place."""

    projection = None

    def evaluating(self):
        return self

    def embed(self, x, space="projection"):
        return F.normalize((x if x.dtype != torch.uint8 else x / 255).mean(dim=(2, 3)), dim=1)


class LightEncoder(PixelEncoder):
    """Turns in a plane by the logarithm of the light, beside its pattern: brighter is exactly a rotation."""

    speed = 3.0

    def embed(self, x, space="projection"):
        x = (x if x.dtype != torch.uint8 else x / 255).double()
        turn = self.speed * x.mean(dim=(1, 2, 3)).log()
        plane = torch.stack([turn.cos(), turn.sin()], dim=1)
        return (plane[:, :, None] * self.pattern(x)[:, None]).flatten(1).float()

    def pattern(self, x):
        return F.normalize((x / x.mean(dim=(1, 2, 3), keepdim=True) - 1).flatten(1), dim=1)


class PatternEncoder(LightEncoder):
    """Does not see how bright an image is."""

    def embed(self, x, space="projection"):
        return self.pattern((x if x.dtype != torch.uint8 else x / 255).double()).float()


class CollapsedEncoder(PixelEncoder):
    def embed(self, x, space="projection"):
        return F.normalize(torch.ones(len(x), 8) + 1e-7 * torch.rand(len(x), 8), dim=1)


class RandomEncoder(PixelEncoder):
    """Never says the same twice."""

    def embed(self, x, space="projection"):
        return F.normalize(torch.randn(len(x), 8), dim=1)


@pytest.fixture
def brighter(monkeypatch):
    """Measures an encoder under random brightness alone; the images are so dark that nothing is cut off."""
    monkeypatch.setitem(FAMILIES, "brightness", {"jitter": (0.5, 0, 0, 0), "jitter_p": 1.0})

    def measure(encoder, images) -> dict:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = measure_equivariance(encoder, images, AugmentationConfig(3), 4, families=["brightness"])
        return {name: mean for name, (mean, _, _) in found["brightness"].items()}

    return measure


CHANCE = {"mrr": sum(1 / k for k in range(1, 51)) / 50, "hit_at_1": 2, "hit_at_5": 10}


def test_an_encoder_that_rotates_exactly_knows_which_augmentation_was_made(brighter):
    found = brighter(LightEncoder(), noise(160, 3) // 2)
    assert found["same_image_hit_at_1"] > 98 and found["same_image_mrr"] > 0.99
    assert found["same_image_hit_at_1_linear"] > 60 and found["cosine_linear"] > 0.99
    assert found["cosine"] > 0.9999 and found["cosine_mlp"] > 0.95 and found["cosine_unrotated"] < 0.9
    assert found["same_image_hit_at_1_unrotated"] < 10
    assert found["rotation_invariance_ratio"] < 1e-6 and found["composition_invariance_ratio"] < 1e-6
    assert found["motion"] > 0.1 and found["motionless"] == 0


@pytest.mark.parametrize("encoder", [PatternEncoder(), CollapsedEncoder()])
def test_an_encoder_that_is_invariant_can_not_look_steerable(brighter, encoder):
    found = brighter(encoder, noise(160, 3) // 2)
    for suffix in ("", "_unrotated", "_linear", "_mlp"):
        for name, chance in CHANCE.items():
            assert found[f"same_image_{name}{suffix}"] == pytest.approx(chance), suffix
    ratios = [
        "rotation_invariance_ratio",
        "special_rotation_invariance_ratio",
        "composition_invariance_ratio",
    ]
    assert all(math.isnan(found[name]) for name in ratios)
    assert found["motionless"] == 100 and not found["motion"] > 1e-8
    assert found["parameters_from_pair"] < 0.1 and found["parameters_from_view"] < 0.1


def test_an_encoder_that_says_anything_is_at_chance(brighter):
    found = brighter(RandomEncoder(), noise(160, 3) // 2)
    for name, chance in CHANCE.items():
        assert found[f"same_image_{name}"] == pytest.approx(chance, rel=0.6)
    assert 0.9 < found["rotation_invariance_ratio"] < 1.2 and 0.8 < found["motion"] < 1.2
    assert abs(found["cosine"]) < 0.15 and found["parameters_from_pair"] < 0.1


def test_what_was_done_is_read_from_the_pair_and_not_from_one_embedding(brighter):
    """Of light that differs between images one view does not tell how much was added."""
    slow, light = LightEncoder(), torch.rand(200, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    slow.speed = 0.3
    found = brighter(slow, (noise(1, 3) // 2 * (0.3 + 0.7 * light)).to(torch.uint8))
    assert found["parameters_from_pair"] > found["parameters_from_view"] + 0.3


def test_every_measure_takes_about_one_forward_pass_a_view():
    class Counted(ColorEncoder):
        seen = 0

        def embed(self, x, space="projection"):
            self.seen += len(x)
            return super().embed(x)

    encoder, images = Counted(), noise(40, 8)
    measure_equivariance(encoder, images, AugmentationConfig(8), draws=50, families=["crop", "color"])
    assert encoder.seen <= 1.1 * 2 * 51 * len(images)  # each image has one augmentation of its own, too


def noise(n, side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8)


def measure_flip(encoder) -> dict:
    images = noise(400, 4)
    return measure_equivariance(encoder, images, AugmentationConfig(4), draws=1, families=["flip"])["flip"]


def test_an_encoder_that_rotates_exactly():
    """Without noise 200 images determine the map in 48 dimensions."""
    found = measure_flip(PixelEncoder())
    assert found["invariance_error"][0] > 1
    assert found["rotation_error"][0] < 1e-6 and found["rotation_invariance_ratio"][0] < 1e-6
    assert found["gram_deviation"][0] < 1e-10 and found["gamma"][0] < 1e-10
    assert found["composition_error"][0] < 1e-8
    assert found["composition_residual"][0] < 1e-6  # twice flipped is not flipped
    assert found["hit_at_1"][0] == 100 and found["mrr"] == (1, 1, 1)
    assert found["hit_at_1_unrotated"][0] < 10 and found["hit_at_1_random"][0] < 10


def test_an_encoder_that_is_invariant():
    found = measure_flip(ColorEncoder())
    ratio = found["rotation_invariance_ratio"][0]
    assert found["invariance_error"][0] < 1e-10 and ratio != ratio  # NaN
    assert found["gram_deviation"][0] < 1e-10


def test_measuring_is_repeatable_and_leaves_the_random_numbers_of_the_process_alone():
    images, config, state = noise(40, 8), AugmentationConfig(8), torch.get_rng_state()
    first = measure_equivariance(PixelEncoder(), images, config, draws=2, families=["crop", "full recipe"])
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    again = measure_equivariance(PixelEncoder(), images, config, draws=2, families=["crop", "full recipe"])
    assert again == first and list(first) == ["crop", "full recipe"]
    for metric, (mean, low, high) in first["full recipe"].items():
        assert low <= mean <= high, metric


def test_all_encoders_are_shown_the_same_augmentations():
    x = noise(6, 16).float() / 255
    for family in FAMILIES:
        first, again, other = (augmentations(family, AugmentationConfig(16), 2, seed) for seed in (0, 0, 1))
        assert all(torch.equal(a(x), b(x)) for a, b in zip(first, again, strict=True))
        if family not in ("flip", "grayscale"):
            assert not torch.equal(first[0](x), other[0](x)), family
            assert not torch.equal(first[0](x), first[1](x)), family


def test_the_augmentation_is_the_one_of_training(tiny_run):
    config, options = Encoder.from_pretrained(tiny_run).config, TrainConfig()
    found = recorded_augmentation(config)
    assert (found.scale, found.jitter) == ((options.crop_scale, 1.0), options.jitter)
    assert (found.blur, found.grayscale) == (options.blur, options.grayscale)
    assert found.blur_kernel_size == options.blur_kernel_size
    assert recorded_augmentation(replace(config, training={})) == AugmentationConfig(32)
    assert recorded_augmentation(replace(config, training=config.training | {"flip": 0.0})).flip == 0
    before = {name: value for name, value in config.training.items() if name != "flip"}  # of version 0.1.0
    assert recorded_augmentation(replace(config, training=before)).flip == 0.5


@pytest.mark.parametrize(
    "nonsense",
    [
        {"jitter": ["much"] * 4},
        {"jitter": [0.4] * 3},
        {"jitter": None},
        {"crop_scale": 0},
        {"blur_kernel_size": 4},
        {"blur_kernel_size": 65},
        {"grayscale": "often"},
    ],
)
def test_nonsense_in_a_strangers_config_is_refused(tiny_run, nonsense):
    config = Encoder.from_pretrained(tiny_run).config
    with pytest.raises(CareHubError, match="makes no sense"):
        recorded_augmentation(replace(config, training=config.training | nonsense))


def test_the_parts_of_a_family_do_what_their_name_says():
    x = noise(3, 16).float() / 255

    def view(family: str) -> torch.Tensor:
        return augmentations(family, AugmentationConfig(16), 1)[0](x)

    assert torch.equal(view("flip"), x.flip(3))
    gray = view("grayscale")
    assert torch.equal(gray[:, 0], gray[:, 1]) and torch.equal(gray[:, 1], gray[:, 2])
    torch.testing.assert_close(augment.rotate(x, 90), x.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(augment.luma(view("hue")).mean(), augment.luma(x).mean(), atol=0.1, rtol=0)
    torch.testing.assert_close(view("blur").mean(), x.mean(), atol=0.02, rtol=0)

"""Transformations by name and strength: what they do, their grids, how they are asked for."""

import pytest
import torch

from care_hub.augment import AugmentationConfig
from care_hub.errors import CareHubError
from care_hub.evaluate.equivariance import sample
from care_hub.transformations import FAMILIES, TRANSFORMATIONS, chain, parse

NAMES = tuple(TRANSFORMATIONS)
X = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_a_transformation_changes_the_more_the_stronger_it_is_and_nothing_at_its_neutral_strength(name):
    transformation, before = TRANSFORMATIONS[name], X.clone()
    assert torch.equal(transformation(X, transformation.neutral), X)
    for end in {transformation.low, transformation.high} - {transformation.neutral}:
        near, far = (transformation(X, transformation.toward(end, t)) for t in (0.3, 1))
        assert far.shape == X.shape and far.min() >= 0 and far.max() <= 1
        if transformation.scale != "switch" and name != "hue":  # half a turn of which is the farthest
            assert (near - X).abs().mean() < (far - X).abs().mean()
        assert (far - X).abs().mean() > 0.02
    assert torch.equal(X, before)
    with pytest.raises(CareHubError, match=f"strength of {name}"):
        transformation(X, transformation.high + 1)
    with pytest.raises(CareHubError, match=f"strength of {name}"):
        transformation.check(float("nan"))


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_has_49_strengths_that_can_be_and_can_be_told_apart(name):
    transformation = TRANSFORMATIONS[name]
    grid = transformation.grid()
    assert len(grid) == (1 if transformation.scale == "switch" else 49)
    assert list(grid) == sorted(set(grid)) and transformation.neutral not in grid
    for strength in grid:
        transformation.check(round(strength, 9))


def test_random_families_are_made_of_the_same_transformations():
    for family, place in (("flip", None), ("grayscale", None), ("hue", 3), ("rotation", "degrees")):
        one = sample(family, AugmentationConfig(16), 1)
        strength = 1.0 if place is None else one.degrees if place == "degrees" else one.params.factors[0, 3]
        torch.testing.assert_close(one(X), TRANSFORMATIONS[family](X, float(strength)), atol=1e-5, rtol=0)
    assert not {name for name in FAMILIES if name not in TRANSFORMATIONS} - {
        *("jitter 0.2", "jitter 0.4", "jitter 0.8", "color", "full recipe")
    }


def test_a_chain_makes_its_parts_in_their_order():
    dark, blurred = (TRANSFORMATIONS["contrast"], 2.25), (TRANSFORMATIONS["saturation"], 2.0)
    one, other = chain([dark, blurred]), chain([blurred, dark])
    torch.testing.assert_close(one(X, 1), blurred[0](dark[0](X, 2.25), 2.0))
    torch.testing.assert_close(one(X, 0.5), blurred[0](dark[0](X, 1.5), 1.5))
    assert not torch.allclose(one(X, 1), other(X, 1)) and torch.equal(one(X, 0), X)
    assert len(set(one.grid())) == 49


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("brightnes=2", "did you mean 'brightness'"),
        ("", "transformations are brightness, contrast"),
        ("brightness=", "strengths as numbers"),
        ("brightness=bright", "strengths as numbers"),
        ("brightness=0.5,9", "from 0.4 to 2.5"),
        ("brightness=nan", "from 0.4 to 2.5"),
        ("brightness=1", "changes nothing"),
        ("flip=0.5", "0 .off. or 1 .on."),
        ("brightness=0.5,2+blur=4", "one strength"),
        ("brightness=2+", "there is no transformation ''"),
    ],
)
def test_what_can_not_be_asked_for_ends_in_one_sentence(text, sentence):
    with pytest.raises(CareHubError, match=sentence):
        parse(text)

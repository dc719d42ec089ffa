"""Which images and views a process sees: a matter of seed, step and place in the global batch."""

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image

from care_hub.augment import AugmentationConfig
from care_hub.config import TrainConfig
from care_hub.data.images import InMemoryImages, StreamedImages
from care_hub.schedule import Plan
from care_hub.training.batches import (
    ViewCutter,
    epoch_order,
    make_views,
    training_augmentation,
    training_batches,
)

AUGMENTATION = AugmentationConfig(size=24)
STILL = {f"equivariance_{name}": 0 for name in ("jitter_p", "grayscale", "blur", "flip")}  # crops alone


def test_options_say_the_augmentation_of_training():
    given = {"jitter": (0.1, 0.2, 0.3, 0.4), "jitter_p": 0.5, "grayscale": 0.6, "blur": 0.7, "flip": 0.8}
    found = training_augmentation(TrainConfig(crop_scale=0.3, equivariance_flip=0, **given))
    assert {name: getattr(found, name) for name in given} == given and found.scale == (0.3, 1.0)


def test_weight_zero_computes_no_equivariance_views():
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    config = TrainConfig(batch_size=8, equiv_splits=2, equivariant_batch_size=4)
    views = make_views(images, config, AugmentationConfig(), 0, 0, 1)
    assert [len(v) for v in views] == [16, 8]
    plain = make_views(images, TrainConfig(batch_size=8, weight=0), AugmentationConfig(), 0, 0, 1)
    assert len(plain) == 1 and torch.equal(plain[0], views[0])  # and the same contrastive views in both arms
    shared = TrainConfig(batch_size=8, equiv_splits=2, views="shared")
    assert len(make_views(images, shared, AugmentationConfig(), 0, 0, 1)) == 1


def test_shared_views_are_sampled_per_group_in_part_of_the_batch_and_per_image_in_the_rest():
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(16, -1, -1, -1)
    config = TrainConfig(batch_size=16, equiv_splits=2, equivariant_batch_size=8, views="shared")
    augmentation = AugmentationConfig(jitter_p=1.0)
    (views,) = make_views(images, config, augmentation, 0, 0, 1)
    for view in views.chunk(2):
        kinds = [view[0::2][:4], view[0::2][4:]]
        assert all(torch.allclose(k, k[:1].expand_as(k), atol=1e-6) for k in kinds) and not torch.allclose(
            kinds[0], kinds[1]
        )
        assert len(view.flatten(1).round(decimals=3).unique(dim=0)) == 8 + 2
    halves = [make_views(images[:8], config, augmentation, 0, rank, 2)[0].chunk(2) for rank in (0, 1)]
    torch.testing.assert_close(views, torch.cat([torch.cat(pair) for pair in zip(*halves, strict=True)]))
    cutter = ViewCutter(config, replace(augmentation, flip=0.0), 1.0)
    image = Image.fromarray(torch.randint(0, 256, (60, 50, 3), dtype=torch.uint8).numpy())
    crops = [cutter(image, 0, place)[0][0].tobytes() for place in range(16)]
    assert len(set(crops[0::2][:4])) == len(set(crops[0::2][4:])) == 1 and len(set(crops)) == 10


def test_one_augmentation_per_batch_as_the_public_code_does():
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(8, -1, -1, -1)
    config = TrainConfig(batch_size=8, equiv_splits=2, augmentation_scope="batch")
    view = make_views(images, config, AugmentationConfig(), 0, 0, 1)[1][:8]
    torch.testing.assert_close(view, view[:1].expand_as(view))


def test_every_image_is_seen_once_an_epoch_by_one_process():
    config = TrainConfig(batch_size=8, epochs=2, equiv_splits=2)
    plan = Plan.of(config, 40)
    seen = [torch.cat(list(epoch_order(config, plan, 40, 0, rank, 2))) for rank in (0, 1)]
    first = torch.cat([s[:20] for s in seen])
    assert sorted(first.tolist()) == list(range(40))
    resumed = torch.cat(list(epoch_order(config, plan, 40, 7, 1, 2)))
    assert torch.equal(resumed, seen[1][7 * 4 :])


@pytest.fixture(params=["in memory", "streamed"])
def images(request):
    """32 images of 40 x 40 pixels that are all different."""
    pixels = torch.randint(
        0, 256, (32, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    if request.param == "in memory":
        return InMemoryImages(40, None, None, pixels)
    rows = []
    for image in pixels.permute(0, 2, 3, 1):
        Image.fromarray(image.numpy()).save(file := io.BytesIO(), "png")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}})
    return StreamedImages(40, None, None, rows)


def views_of(images, processes=1, augmentation=AUGMENTATION, **options):
    """For each of four steps the pairs of views of the global batch of 16, (2, 16 or fewer, 3, 24, 24)."""
    config = TrainConfig(
        **{"batch_size": 16, "equiv_splits": 4, "epochs": 2, "weight_start_epochs": 0} | options
    )
    plan, steps = Plan.of(config, len(images)), []
    for rank in range(processes):
        shares = (images, augmentation, 0, rank, processes)
        for step, batch in enumerate(training_batches(config, plan, *shares)):
            pairs = make_views(batch, config, augmentation, step, rank, processes, plan.weight_start)
            steps.append([torch.stack(pair.chunk(2)) for pair in pairs])
            if not isinstance(batch, torch.Tensor):  # loader processes cut what is used
                assert sum(part is not None for part in batch) == len(pairs)
    parts = [steps[rank * plan.steps : (rank + 1) * plan.steps] for rank in range(processes)]
    return [[torch.cat(pair, dim=1) for pair in zip(*step, strict=True)] for step in zip(*parts, strict=True)]


def same(a, b):
    """Whether two lists of what `views_of` gives for a step are equal, up to rounding."""
    pairs = [pair for step in zip(a, b, strict=True) for pair in zip(*step, strict=True)]
    return all(torch.allclose(x, y, atol=1e-6) for x, y in pairs)


def test_the_equivariance_views_have_an_augmentation_of_their_own_where_it_is_given(images):
    plain, gray = views_of(images), views_of(images, equivariance_grayscale=1, equivariance_crop_scale=0.9)
    assert same([step[:1] for step in plain], [step[:1] for step in gray])
    for first, second in gray:
        assert not torch.allclose(first[:, :, 0], first[:, :, 1], atol=1e-3)
        assert torch.allclose(second[:, :, 0], second[:, :, 1], atol=1e-6)
    own = {"crop_scale": 0.08, "jitter": (0.4, 0.4, 0.4, 0.1), "grayscale": 0.2, "blur": 0.5, "flip": 0.5}
    assert same(plain, views_of(images, **{f"equivariance_{name}": value for name, value in own.items()}))


def test_a_shared_crop_is_an_image_s_own_and_the_same_in_both_views(images):
    shared = views_of(images, equivariance_crop="shared", **STILL)
    one = torch.cat([second for _, second in shared], dim=1)
    torch.testing.assert_close(one[0], one[1])
    assert same([step[:1] for step in shared], [step[:1] for step in views_of(images)])
    if isinstance(images, InMemoryImages):  # whose other parameters are those of cropped views
        colors = {
            "equivariance_jitter_p": 1.0,
            "augmentation": AugmentationConfig(24, scale=(1, 1), ratio=(1, 1)),
        }
        assert same(views_of(images, **colors), views_of(images, equivariance_crop="shared", **colors))
        alike = InMemoryImages(40, None, None, images.pixels[:1].expand(32, -1, -1, -1))
    else:
        alike = StreamedImages(40, None, None, images.rows[:1] * 32)
    for _, second in views_of(alike, equivariance_crop="shared", **STILL):
        assert len(second[0].flatten(1).unique(dim=0)) == 16  # no two images of the batch have the same crop


@pytest.mark.parametrize("views", ["separate", "shared"])
def test_before_lambda_starts_views_are_those_of_the_plain_method(images, views):
    late = views_of(images, views=views, weight_start_epochs=1)
    assert same(late[:2], views_of(images, weight=0)[:2]) and [len(step) for step in late[:2]] == [1, 1]
    assert same(late[2:], views_of(images, views=views)[2:])


def test_over_a_frozen_backbone_a_steering_head_sees_no_contrastive_views(images):
    steering = {"init": "x.y", "steering_head": True, "equivariant_batch_size": 8}
    both, alone = views_of(images, **steering), views_of(images, freeze_backbone=True, **steering)
    assert {len(step) for step in alone} == {1} and same([step[1:] for step in both], alone)
    # And lambda, which has nothing to balance, is there from the first step.
    assert Plan.of(TrainConfig(freeze_backbone=True, **steering, equiv_splits=4), 64).weight_warmup == 0


@pytest.mark.parametrize("crop", [True, False, "shared"])
def test_views_do_not_depend_on_the_number_of_processes(images, crop):
    options = {
        "equivariance_crop": crop,
        "equivariance_jitter": (0.8, 0.8, 0.8, 0.5),
        "weight_start_epochs": 1,
    }
    options |= {"equivariant_batch_size": 8, "equiv_splits": 4}
    whole = views_of(images, **options)
    assert [[pair.shape[1] for pair in step] for step in whole] == [[16], [16], [16, 8], [16, 8]]
    assert same(whole, views_of(images, processes=2, **options))

"""Which images and views a process sees: a matter of seed, step and place in the global batch."""

from dataclasses import replace

import torch
from PIL import Image

from care_hub.augment import AugmentationConfig
from care_hub.config import TrainConfig
from care_hub.schedule import Plan
from care_hub.training.batches import ViewCutter, epoch_order, make_views


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

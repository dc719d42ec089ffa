"""What a run measures of itself: kNN where there are labels, the rotation protocol always."""

import torch
from accelerate import Accelerator

from care_hub.augment import AugmentationConfig
from care_hub.config import DataConfig, TrainConfig
from care_hub.data.images import InMemoryImages
from care_hub.data.sources import load_splits
from care_hub.encoder import Encoder
from care_hub.evaluate.monitor import final_results, knn_bank, knn_monitor


def images(labels: torch.Tensor | None, count: int) -> InMemoryImages:
    pixels = torch.arange(count).to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    return InMemoryImages(8, labels, None, pixels.clone())


def test_the_bank_has_labels_and_is_fixed_by_the_seed():
    labels = torch.arange(100) % 4 - 1  # every fourth is unknown
    some = images(labels, 100)
    bank = knn_bank(TrainConfig(knn_bank=30), some)
    assert len(bank) == 30 and (bank.labels >= 0).all()
    assert torch.equal(bank.pixels, knn_bank(TrainConfig(knn_bank=30), some).pixels)
    assert not torch.equal(bank.pixels, knn_bank(TrainConfig(knn_bank=30, seed=1), some).pixels)
    assert len(knn_bank(TrainConfig(knn_bank=500), some)) == 75
    whole = images(labels.clamp(min=0), 100)
    assert knn_bank(TrainConfig(knn_bank=100), whole) is whole


def test_without_labels_or_a_test_split_there_is_no_knn(tiny_run):
    encoder, accelerator = Encoder.from_pretrained(tiny_run), Accelerator(cpu=True)
    known, unknown = images(torch.zeros(4, dtype=torch.long), 4), images(torch.full((4,), -1), 4)
    for train, test in ((known, None), (known, images(None, 4)), (images(None, 4), known), (unknown, known)):
        found = knn_monitor(TrainConfig(), encoder, train, test, accelerator, ("label", "color"))
        assert found == [None, None]


def test_test_images_of_unknown_label_do_not_count(tiny_run):
    encoder, accelerator = Encoder.from_pretrained(tiny_run), Accelerator(cpu=True)
    train, test = images(torch.zeros(4, dtype=torch.long), 4), images(torch.tensor([0, -1, 0, -1]), 4)
    assert knn_monitor(TrainConfig(), encoder, train, test, accelerator) == [100.0]


def test_final_results_are_measured_without_labels_too(tiny_run, photos):
    encoder, accelerator = Encoder.from_pretrained(tiny_run), Accelerator(cpu=True)
    source = DataConfig("imagefolder", data_root=str(photos))
    train, test = load_splits(source, size=32, progress=False)
    config = TrainConfig("imagefolder", data_root=str(photos))
    state, augmentation = torch.get_rng_state(), AugmentationConfig(32)
    both, families = final_results(config, encoder, train, test, augmentation, accelerator)
    errors = ["rotation_error", "invariance_error", "rotation_invariance_ratio", "gram_deviation"]
    errors += ["motionless", "color_motion", "color_same_image_hit_at_1"]
    assert list(both) == ["knn_top1", *errors] and both["knn_top1"] > 85
    assert list(families) == ["color"]
    alone, _ = final_results(config, encoder, train, None, augmentation, accelerator)
    assert list(alone) == errors
    short = TrainConfig("imagefolder", data_root=str(photos), max_steps=3)
    assert final_results(short, encoder, train, test, augmentation, accelerator) == ({}, {})
    assert torch.equal(torch.get_rng_state(), state)

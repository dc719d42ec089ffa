"""Embeddings of whole data sets: nothing depends on their order, and labels are never guessed."""

import pytest
import torch
from accelerate import Accelerator

from care_hub.config import DataConfig
from care_hub.data.images import InMemoryImages
from care_hub.data.sources import load_splits
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.evaluate.features import embed_all, embed_view, label_subset, labeled, random_subset


def blank(labels: list[int] | None, class_names: list[str] | None = None) -> InMemoryImages:
    count = 3 if labels is None else len(labels)
    y = None if labels is None else torch.tensor(labels)
    return InMemoryImages(8, y, class_names, torch.zeros(count, 3, 8, 8, dtype=torch.uint8))


def test_test_sets_sorted_by_class_are_mixed_before_they_are_halved():
    order = random_subset(1000, 400)
    assert len(set(order.tolist())) == 400 and 100 < (order[:200] < 500).sum() * 2 < 300
    assert torch.equal(random_subset(1000, 400), order)


def test_the_embeddings_of_a_split_are_those_of_its_images(tiny_run, photos):
    encoder = Encoder.from_pretrained(tiny_run)
    train, _ = load_splits(DataConfig("imagefolder", data_root=str(photos)), size=32, progress=False)
    together = embed_all(encoder, train, Accelerator(cpu=True), "projection", batch=7)
    one_by_one = torch.cat([encoder.embed(train.pixels[k : k + 1]) for k in range(len(train))])
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=0)
    torch.testing.assert_close(embed_view(encoder, train.pixels), one_by_one, atol=1e-5, rtol=0)


def test_images_without_a_label_are_left_out():
    train, test = labeled("d", blank([0, -1, 2], ["a", "b", "c"]), blank([1, 1]))
    assert train.labels.tolist() == [0, 2] and len(train) == 2 and len(train.images) == 2
    assert train.class_names == test.class_names == ["a", "b", "c"]
    unnamed = blank([0, 3])
    assert labeled("d", unnamed, blank([4]))[0].class_names == ["0", "1", "2", "3", "4"]
    assert unnamed.class_names is None  # the data set is left as it was
    for train_labels, test_labels in ((None, [0]), ([0], None), ([-1, -1], [0])):
        with pytest.raises(CareHubError, match="needs labels in a training and a test split, which 'd'"):
            labeled("d", blank(train_labels), blank(test_labels))


def test_a_fraction_of_the_labels_has_some_of_each_class():
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    for fraction, counts in ((0.1, [9, 1, 1]), (0.01, [1, 1, 1]), (1.0, [90, 9, 1])):
        assert labels[label_subset(labels, fraction, 0)].bincount().tolist() == counts
    assert label_subset(labels, 0.1, 0).tolist() != label_subset(labels, 0.1, 1).tolist()

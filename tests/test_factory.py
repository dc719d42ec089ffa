"""From a name to what people ask for: backbones to fine-tune, classifiers, lists, and suggestions."""

import numpy as np
import pytest
import torch
from helpers import OLD, PHOTO, care_hub_command

import care_hub
from care_hub.errors import CareHubError
from care_hub.factory import load_classifier, load_linear_head, push_export

SHIPPED = "resnet10_w16_small.care_shapes"


def test_pretrained_backbones_for_fine_tuning():
    name = care_hub.list_models("*shapes*", pretrained=True)[0]
    model = care_hub.create_model(name, pretrained=True, num_classes=7)
    expected, found = care_hub.load_encoder(name).backbone.state_dict(), model.state_dict()
    assert set(found) - set(expected) == {"fc.weight", "fc.bias"} and len(expected) > 50
    assert all(torch.equal(found[k], v.cpu()) for k, v in expected.items())
    assert model.training and model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(CareHubError, match="drop_rate"):
        care_hub.create_model(name, pretrained=True, drop_rate=0.1)
    with pytest.raises(CareHubError, match="no pretrained weights for 'resnet50_cifar'"):
        care_hub.create_model("resnet50_cifar", pretrained=True)


def test_misspelt_names_are_corrected():
    with pytest.raises(CareHubError, match=f"did you mean '{SHIPPED}'"):
        care_hub.load_encoder(SHIPPED[:-1] + "z")
    with pytest.raises(CareHubError, match="did you mean 'resnet18_cifar'"):
        care_hub.create_model("resnet18_ciffar")
    with pytest.raises(CareHubError, match=r"not in the registry; `care-hub list` shows it\."):
        care_hub.load_encoder("nothing of the kind")
    small = ["resnet18_cifar", "resnet18_w16_cifar", "resnet34_cifar", "resnet50_cifar"]
    assert care_hub.list_models("*_cifar") == small


def test_a_classifier_says_names_and_probabilities():
    classifier = load_classifier(SHIPPED)
    labels, probabilities = classifier.classify(np.zeros((2, 32, 32, 3), np.uint8))
    assert set(labels) <= set(classifier.class_names) and probabilities.shape == (2, 10)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    with pytest.raises(CareHubError, match="no linear head for 'cifar10'; it has: shapes"):
        load_classifier(SHIPPED, dataset="cifar10")


def test_what_can_not_be_loaded_is_not_published(tmp_path):
    for file in (OLD / "export").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CareHubError, match="sha256"):
        push_export(tmp_path, "lab/tiny")


def test_class_names_of_strangers_forge_no_row(export, tmp_path):
    head = load_linear_head(export)
    head.class_names = [f"dog\t1.0\nother.png\tcat{k}\x1b]0;title\x07" for k in range(10)]
    head.save(export)
    PHOTO.save(tmp_path / "a.png")
    said = care_hub_command("classify", tmp_path / "a.png", "--encoder", export)
    [row] = said.splitlines()
    assert len(row.split("\t")) == 3 and "\x1b" not in said and "\x07" not in said

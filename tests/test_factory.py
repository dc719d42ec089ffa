"""From a name to what people ask for: backbones to fine-tune, classifiers, lists, and suggestions."""

import numpy as np
import pytest
import timm
import torch
from helpers import OLD, PHOTO, care_hub_command

import care_hub
from care_hub import LinearHead, Rotation, augment, losses, metrics, rotation
from care_hub.augment import AugmentationConfig
from care_hub.config import DataConfig
from care_hub.convert import convert_checkpoint
from care_hub.data import shapes
from care_hub.data.decode import find_images
from care_hub.data.inputs import to_pixels
from care_hub.data.sources import load_split, load_splits
from care_hub.embed_folder import embed_folder
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.evaluate.commands import evaluate_equivariance, evaluate_knn
from care_hub.evaluate.equivariance import augmentations, rotation_errors
from care_hub.evaluate.linear import fit_linear
from care_hub.factory import any_encoder, load_classifier, load_encoder, load_linear_head, push_export
from care_hub.files import make_folder
from care_hub.hub import registry
from care_hub.report.page import write_page

SHIPPED, SMALL = "resnet10_w16_small.care_shapes", "resnet10_w16_small"
NAN, Z, LABELS = float("nan"), torch.eye(8)[:, :4] + 0.1, torch.arange(8) % 2
IMAGES = torch.zeros(8, 3, 32, 32)


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
    with pytest.raises(CareHubError, match="not a complete safetensors file"):
        push_export(tmp_path, "lab/tiny")


def test_class_names_of_strangers_forge_no_row(export, tmp_path):
    head = load_linear_head(export)
    head.class_names = [f"dog\t1.0\nother.png\tcat{k}\x1b]0;title\x07" for k in range(10)]
    head.save(export)
    PHOTO.save(tmp_path / "a.png")
    said = care_hub_command("classify", tmp_path / "a.png", "--encoder", export)
    [row] = said.splitlines()
    assert len(row.split("\t")) == 3 and "\x1b" not in said and "\x07" not in said


PATHS = {
    "load_encoder": care_hub.load_encoder,
    "load_linear_head": load_linear_head,
    "LinearHead.load": LinearHead.load,
    "data_root": lambda path: load_splits(DataConfig("imagefolder", data_root=path)),
    "evaluate_knn": lambda path: evaluate_knn(path, DataConfig("shapes")),
    "evaluate_equivariance": lambda path: evaluate_equivariance((path,), DataConfig("shapes"), output=path),
    "find_images": find_images,
    "fingerprint_of": care_hub.fingerprint_of,
    "convert from": lambda path: convert_checkpoint(path, "out"),
    "convert to": lambda path: convert_checkpoint("absent", path),
    "embed": lambda path: embed_folder(str(OLD), SHIPPED, f"{path}/z.npy", "backbone", 1, False),
    "Rotation.load": Rotation.load,
    "Rotation.save": lambda path: Rotation.random(2).save(path),
    "save_pretrained": lambda path: Encoder.new(SMALL).save_pretrained(path),
    "make_folder": make_folder,
    "report on": lambda path: write_page([path], "page.html"),
    "report to": lambda path: write_page([OLD / "run"], path),
    "push_export": lambda path: push_export(path, "lab/tiny"),
}


@pytest.mark.parametrize(
    "path", ["a" * 5000, "a\0b", "file/x/y", ""], ids=["long", "NUL", "below a file", "none"]
)
@pytest.mark.parametrize("call", PATHS)
def test_impossible_paths_are_user_errors(call, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    if (call, path) not in {("make_folder", ""), ("save_pretrained", ""), ("convert to", "")}:  # here
        with pytest.raises(CareHubError, match=r"\w"):
            PATHS[call](path)


def augmented(rows: int = 8, **options) -> torch.Tensor:
    config = AugmentationConfig(**options)
    params = augment.sample(config, rows, 32, 32, augment.seeded_generator(0))
    return augment.apply(IMAGES, params, config)


WRONG = {
    "tag": lambda: care_hub.create_model("resnet18.nonsense"),
    "arguments": lambda: care_hub.create_model(SMALL, in_chans=-1),
    "classes": lambda: care_hub.create_model(SHIPPED, pretrained=True, num_classes=-1),
    "hidden": lambda: Encoder.new(SMALL, hidden=0),
    "outputs": lambda: Encoder.new(SMALL, outputs=10**18),
    "std": lambda: Encoder.new(SMALL, std=(0, 0, 0)),
    "crop_pct": lambda: Encoder.new(SMALL, crop_pct=NAN),
    "image_size": lambda: Encoder.new(SMALL, image_size=10**30),
    "embed": lambda: Encoder.new(SMALL).embed(IMAGES[0]),
    "no pixels": lambda: to_pixels(None),
    "head": lambda: load_linear_head(SHIPPED)(np.zeros((2, 5), np.float32)),
    "split": lambda: load_split(DataConfig("shapes"), "tset"),
    "size": lambda: load_split(DataConfig("shapes"), "test", -1),
    "seed": lambda: shapes.make("test", -5),
    "fit rows": lambda: rotation.procrustes(Z, Z[:5]),
    "fit nothing": lambda: rotation.procrustes(Z[:0], Z[:0]),
    "fit NaN": lambda: rotation.procrustes(Z, Z * NAN),
    "fit too large": lambda: Rotation.fit(Z.double() * 1e300, Z.double() * 1e300),
    "fit ragged": lambda: Rotation.fit([[1, 2], [3]], [[1, 2], [3]]),
    "rotate ints": lambda: Rotation.random(2)(np.ones((3, 2), int)),
    "rotate a number": lambda: Rotation.random(2)(torch.tensor(1.0)),
    "power": lambda: Rotation.random(3).power(NAN),
    "dimension": lambda: Rotation.random(0),
    "empty matrix": lambda: Rotation(torch.ones(0, 3, 3)),
    "residual": lambda: Rotation.random(4).residual(Z, Z[:1]),
    "views": lambda: rotation_errors(Z, []),
    "family": lambda: augmentations("hues", AugmentationConfig(), 2),
    "draws": lambda: augmentations("hue", AugmentationConfig(), 0),
    "effective_rank": lambda: metrics.effective_rank(Z * NAN),
    "invariance": lambda: metrics.invariance(Z, Z[:1]),
    "bootstrap": lambda: metrics.bootstrap_weights(0, 3, torch.Generator()),
    "k": lambda: metrics.knn_top1(Z, LABELS, Z, LABELS, k=-1),
    "kNN temperature": lambda: metrics.knn_top1(Z, LABELS, Z, LABELS, temperature=NAN),
    "kNN labels": lambda: metrics.knn_top1(Z, LABELS - 1, Z, LABELS),
    "kNN bank": lambda: metrics.knn_top1(Z[:0], LABELS[:0], Z, LABELS),
    "kNN NaN": lambda: metrics.knn_top1(Z * NAN, LABELS, Z, LABELS),
    "temperature": lambda: losses.info_nce(Z, Z, 0),
    "alignment": lambda: losses.alignment(Z, Z[:1], 0.5),
    "uniformity": lambda: losses.uniformity(Z[:0], Z[:0], 0.5),
    "equivariance": lambda: losses.equivariance(Z, Z[:4], 2),
    "queue": lambda: losses.moco(Z, Z, Z.T, 0.5),
    "augmented rows": lambda: augmented(rows=5),
    "draws of groups": lambda: augment.two_views(IMAGES, AugmentationConfig(), 0, 0, "", draws=3),
    "augmented size": lambda: augmented(size=0),
    "number of augmentations": lambda: augmented(rows=-1),
    "scale": lambda: augmented(scale=(NAN, 1)),
    "NaN features": lambda: fit_linear(Z * NAN, LABELS, 2, 0.1),
    "kernel": lambda: augmented(blur_kernel_size=65),
    "report": lambda: write_page([], "page.html"),
    "no encoder": lambda: evaluate_equivariance((), DataConfig("shapes")),
}


@pytest.mark.parametrize("call", WRONG)
def test_what_data_and_sizes_can_cause_is_a_user_error(call):
    with pytest.raises(CareHubError, match=r"\w"):
        WRONG[call]()


@pytest.mark.parametrize("turn", [lambda z: z[::-1], lambda z: z.astype(">f4"), lambda z: z[:, ::-1]])
def test_arrays_of_any_layout_are_fitted(turn):
    z = turn(Z.numpy())
    assert np.allclose(Rotation.fit(z, z)(Z.numpy()), Z.numpy(), atol=1e-5)


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_networks_of_timm_are_encoders_without_a_head(architecture, tmp_path):
    network = timm.create_model(architecture).eval()
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)  # with its classifier
    encoder, seen = any_encoder(tmp_path), network.pretrained_cfg
    assert (encoder.config.model, encoder.projection) == (architecture, None)
    assert encoder.config.image_size == seen["input_size"][-1] and encoder.config.mean == seen["mean"]
    x = torch.rand(2, 3, encoder.config.image_size, encoder.config.image_size)
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(x), pre_logits=True)
        torch.testing.assert_close(encoder.features(x), expected)
    encoder.save_pretrained(tmp_path / "ours")
    assert load_encoder(tmp_path / "ours").fingerprint == encoder.fingerprint
    with pytest.raises(CareHubError, match="not a care_hub configuration"):
        load_encoder(tmp_path)


def test_any_name_of_an_encoder_will_do(tiny_run, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    assert any_encoder(tiny_run).fingerprint == load_encoder(tiny_run).fingerprint
    assert any_encoder("resnet10_w16_small").projection is not None
    for name in ("resnet18.nonsense", "resnet18_cifar", "resnet0"):
        with pytest.raises(CareHubError, match=name.split(".")[0]):
            any_encoder(name)

"""Encoders by name: the one in the package, those that others register, and what is said of misspelt ones."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import run

import care_hub
from care_hub import cli, registry
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.registry import Entry


def test_an_encoder_of_the_package_loads_offline_and_knows_shapes():
    name = care_hub.list_models(pretrained=True)[0]
    folder = registry.entries()[name].folder
    assert sum(p.stat().st_size for p in folder.iterdir()) < 2_000_000
    from care_hub.data import shapes

    table = shapes.make("test").select(range(300))
    labels, _ = care_hub.load_classifier(name, dataset="shapes").classify(table["image"])
    right = np.mean([label == shapes.SHAPES[k] for label, k in zip(labels, table["label"], strict=True)])
    top1 = care_hub.load_linear_head(name, dataset="shapes").metrics["top1"]
    assert right > 0.5 and abs(100 * right - top1) < 12  # 300 of the 2,000 pictures behind `top1`
    z = care_hub.load_encoder(name).encode(table["image"][:4])
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)


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
    name = care_hub.list_models(pretrained=True)[0]
    with pytest.raises(CareHubError, match=f"did you mean '{name}'"):
        care_hub.load_encoder(name[:-1] + "z")
    assert care_hub.list_models("*_cifar") == ["resnet18_cifar", "resnet18_w16_cifar", "resnet34_cifar", "resnet50_cifar"]


def test_others_can_register_encoders(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    folder = Encoder.new("resnet10_w16_small", hidden=8, outputs=4).save_pretrained(tmp_path / "e")
    sums = json.loads((folder / "config.json").read_text())["care"]["sha256"]
    entry = Entry("resnet10_w16_small.birds", folder=folder, sha256=sums["model.safetensors"], metrics={"top1": 12.5}, license="cc0-1.0")
    care_hub.register_encoder(entry)
    assert care_hub.load_encoder("resnet10_w16_small.birds").care["projection"]["outputs"] == 4
    done = CliRunner().invoke(cli.main, ["list", "--pretrained", "*birds"])
    assert done.output.strip() == "resnet10_w16_small.birds  (top1 12.5 %, cc0-1.0)"
    with pytest.raises(CareHubError, match="already an encoder"):
        care_hub.register_encoder(Entry("resnet10_w16_small.birds", repo_id="a/b"))
    care_hub.register_encoder(Entry("resnet10_w16_small.forged", folder=folder, sha256="0" * 64))
    with pytest.raises(CareHubError, match="not those that were registered"):
        care_hub.load_encoder("resnet10_w16_small.forged")
    with pytest.raises(CareHubError, match=r"architecture\.tag"):
        Entry("birds", folder=folder)


def test_an_installed_package_registers_by_entry_point(tmp_path):
    about = tmp_path / "birds-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: birds\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[care_hub.encoders]\nall = birds:encoders\nbroken = birds:absent\nodd = birds:words\nthief = birds:thief\n"
    )
    (tmp_path / "birds.py").write_text(
        "from care_hub.registry import Entry\ndef encoders():\n    return [Entry('resnet18_cifar.birds', repo_id='ann/birds')]\n"
        "def words():\n    return ['resnet18_cifar.birds']\n"
        "def thief():\n    return [Entry('resnet10_w16_small.care_shapes', repo_id='eve/care_shapes')]\n"
    )
    code = "import care_hub; print(care_hub.list_models('*birds', pretrained=True))\n"
    code += "print(care_hub.registry.find('resnet10_w16_small.care_shapes').repo_id)"
    done = run("python", "-c", code, env={"PYTHONPATH": str(tmp_path)})
    assert done.stdout == "['resnet18_cifar.birds']\nNone\n"
    for name in ("birds:absent", "birds:words", "birds:thief"):
        assert f"'{name}' can't be registered" in done.stderr

"""Encoders by name: the one in the package, those that others register, and what is said of misspelt ones."""

import json
import sys
from functools import cache

import numpy as np
import pytest
from click.testing import CliRunner

import care_hub
from care_hub import cli
from care_hub.data import shapes
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.hub import client, registry
from care_hub.registry import Entry


def test_an_encoder_of_the_package_loads_offline_and_knows_shapes():
    name = "resnet10_w16_small.care_shapes"
    folder = registry.entries()[name].folder
    assert sum(p.stat().st_size for p in folder.iterdir()) < 2_000_000
    table = shapes.make("test").select(range(300))
    labels, _ = care_hub.load_classifier(name, dataset="shapes").classify(table["image"])
    right = np.mean([label == shapes.SHAPES[k] for label, k in zip(labels, table["label"], strict=True)])
    top1 = care_hub.load_linear_head(name, dataset="shapes").metrics["top1"]
    assert right > 0.5 and abs(100 * right - top1) < 12  # 300 of the 2,000 images behind `top1`
    z = care_hub.load_encoder(name).encode(table["image"][:4])
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)


def test_encoders_of_the_package_are_small():
    folders = [path.parent for path in registry.SHIPPED.glob("*/config.json")]
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    assert len(sizes) == 5 and max(sizes) <= 3e6 and sum(sizes) <= 12e6


def test_a_misspelt_folder_is_told_first_then_what_the_hub_says(server, tmp_path, monkeypatch):
    """It said that the Hub can't be reached, and no more."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CareHubError) as absent:
        registry.locate("runs/typo")
    start = "there is no folder 'runs/typo' here, and "
    assert str(absent.value).startswith(start + "there is no repository 'runs/typo' on the Hub")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(client, "RETRY_SECONDS", ())
    with pytest.raises(CareHubError) as unreachable:
        registry.locate("runs/typo")
    assert str(unreachable.value).startswith(
        start + "'runs/typo' is not whole in the cache and the Hub can't"
    )
    done = CliRunner().invoke(cli.main, ["info", "runs/typo"])
    assert done.exit_code == 1 and "There is no folder 'runs/typo' here" in done.output


def test_others_can_register_encoders(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    folder = Encoder.new("resnet10_w16_small", hidden=8, outputs=4).save_pretrained(tmp_path / "e")
    checksum = json.loads((folder / "config.json").read_text())["care"]["sha256"]["model.safetensors"]
    name, about = "resnet10_w16_small.birds", {"metrics": {"top1": 12.5}, "license": "cc0-1.0"}
    entry = Entry(name, folder=folder, sha256=checksum, **about)
    care_hub.register_encoder(entry)
    care_hub.register_encoder(entry)  # again: it is the same
    assert care_hub.load_encoder(name).config.projection.outputs == 4
    done = CliRunner().invoke(cli.main, ["list", "--pretrained", "*birds"])
    assert done.output.strip() == "resnet10_w16_small.birds  (top1 12.5 %, cc0-1.0)"
    with pytest.raises(CareHubError, match="already an encoder"):
        care_hub.register_encoder(Entry(name, repo_id="a/b"))
    care_hub.register_encoder(Entry("resnet10_w16_small.forged", folder=folder, sha256="0" * 64))
    with pytest.raises(CareHubError, match="not those that were registered"):
        care_hub.load_encoder("resnet10_w16_small.forged")
    for wrong in (
        {"name": "birds", "folder": folder},
        {"name": name},
        {"name": name, "folder": folder, "repo_id": "a/b"},
    ):
        with pytest.raises(CareHubError, match=r"architecture\.tag and either `repo_id` or `folder`"):
            Entry(**wrong)


def test_an_entry_on_the_hub_is_fetched_at_its_revision(server, export, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    care_hub.Encoder.new("resnet10_w16_small", hidden=8, outputs=4).push_to_hub("lab/birds")
    care_hub.load_encoder(export).push_to_hub("lab/birds", revision="v2")
    care_hub.register_encoder(Entry("resnet10_w16_small.birds", repo_id="lab/birds", revision="v2"))
    assert care_hub.load_encoder("resnet10_w16_small.birds").config.projection.outputs == 16
    main = care_hub.load_encoder("resnet10_w16_small.birds", revision="main")
    assert main.config.projection.outputs == 4


def test_an_installed_package_registers_by_entry_point(tmp_path, monkeypatch):
    about = tmp_path / "birds-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: birds\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[care_hub.encoders]\n"
        "all = birds:encoders\nbroken = birds:absent\nodd = birds:words\nthief = birds:thief\n"
        "quits = sys:exit\n"
    )
    (tmp_path / "birds.py").write_text(
        "from care_hub.registry import Entry\n"
        "def encoders():\n    return [Entry('resnet18_cifar.birds', repo_id='ann/birds')]\n"
        "def words():\n    return ['resnet18_cifar.birds']\n"
        "def thief():\n    return [Entry('resnet10_w16_small.care_shapes', repo_id='eve/care_shapes')]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_installed", cache(registry._installed.__wrapped__))  # as at the start
    with pytest.warns(UserWarning) as warned:
        assert care_hub.list_models("*birds", pretrained=True) == ["resnet18_cifar.birds"]
    assert care_hub.registry.find("resnet10_w16_small.care_shapes").repo_id is None
    said = "\n".join(str(warning.message) for warning in warned)
    for name in ("birds:absent", "birds:words", "birds:thief", "sys:exit"):
        assert f"'{name}' can't be registered" in said
    del sys.modules["birds"]

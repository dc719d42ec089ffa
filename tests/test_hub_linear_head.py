"""Linear heads: files beside the encoder on whose features they were trained."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import OLD, killed_at_each_rename
from safetensors.torch import load_file

import care_hub
from care_hub import cli
from care_hub.errors import CareHubError
from care_hub.files import write_tensors
from care_hub.hub.export import read_config
from care_hub.hub.linear_head import LinearHead, head_file_name, head_files


def test_a_head_comes_back_as_it_was_saved(export):
    saved = LinearHead("ann/pets", torch.randn(2, 128), torch.randn(2), ["cat", "dog"], {"protocol": "sgd"})
    path = saved.save(export)
    found = care_hub.load_linear_head(export, dataset="ann/pets")
    assert path.name == head_file_name("ann/pets") == "linear_head.ann--pets.safetensors"
    assert path in head_files(export) and len(head_files(export)) == 2
    assert torch.equal(found.weight, saved.weight) and torch.equal(found.bias, saved.bias)
    assert (found.dataset, found.class_names, found.metrics) == (
        "ann/pets",
        ["cat", "dog"],
        {"protocol": "sgd"},
    )
    features = torch.randn(3, 128)
    np.testing.assert_allclose(found(features.numpy()), found(features).numpy(), atol=1e-5)


def test_its_sum_is_in_it_and_a_damaged_head_is_no_damaged_encoder(export):
    path = export / "linear_head.shapes.safetensors"
    assert path.name not in read_config(export)[0].sha256
    content = path.read_bytes()
    for damaged in (
        content[:-1] + bytes([content[-1] ^ 1]),
        content.replace(b"class 3", b"class 4"),
        content.replace(b"61.5", b"91.5"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(CareHubError, match="is damaged: its sha256 is wrong"):
            care_hub.load_linear_head(export)
    care_hub.load_encoder(export)


@pytest.mark.parametrize("version", ["0.1", "this"])
def test_a_head_that_is_replaced_locks_nothing_whenever_that_is_interrupted(
    version, export, tmp_path, monkeypatch
):
    """Version 0.1 kept its sum in config.json: a kill between two renames locked the encoder for good."""
    folder = shutil.copytree(OLD / "export", tmp_path / "old") if version == "0.1" else export
    head = replace(LinearHead.load(folder / "linear_head.shapes.safetensors"), metrics={"top1": 1.0})
    new = []
    for _ in killed_at_each_rename(lambda: head.save(folder), monkeypatch):
        care_hub.load_encoder(folder)
        new.append(care_hub.load_linear_head(folder).metrics == head.metrics)
    assert new == ([False, True] if version == "this" else [False, False, True])


def test_a_head_of_other_weights_or_of_nonsense_is_refused(export):
    head = LinearHead.load(export / "linear_head.shapes.safetensors")
    head.encoder = "0" * 64
    head.save(export)
    with pytest.raises(CareHubError, match="trained on other weights"):
        care_hub.load_linear_head(export, dataset="shapes")
    LinearHead("narrow", torch.ones(2, 7), torch.ones(2), ["a", "b"], {}).save(export)
    with pytest.raises(CareHubError, match="does not take this encoder's 128 features"):
        care_hub.load_classifier(export, dataset="narrow")
    with pytest.raises(CareHubError, match="no linear head for 'cifar10'; it has: narrow, shapes"):
        care_hub.load_linear_head(export, dataset="cifar10")
    with pytest.raises(CareHubError, match="no linear head without saying for which data set; it has"):
        care_hub.load_linear_head(export)
    (export / "linear_head.narrow.safetensors").write_bytes(b"junk")
    with pytest.raises(CareHubError, match="narrow"):
        care_hub.load_linear_head(export, dataset="narrow")


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"class_names": "7"},
        {"class_names": "[" * 50_000},
        {"metrics": "[1]"},
        {"metrics": '{"top1": "<b>"}'},
        {"metrics": '{"n_train": null}'},
    ],
)
def test_a_head_with_hostile_metadata_is_refused(about, export):
    path = export / "linear_head.shapes.safetensors"
    names = json.dumps([f"class {k}" for k in range(10)])
    metadata = {"dataset": "shapes", "class_names": names, "metrics": "{}"} | about if about else {}
    write_tensors(path, load_file(path), metadata)
    with pytest.raises(CareHubError, match="is not a linear head of care_hub"):
        LinearHead.load(path)


def test_a_head_that_contradicts_itself_or_is_not_finite_is_refused(tmp_path):
    for head, sentence in (
        (LinearHead("a", torch.ones(2, 3), torch.ones(2), ["one"], {}), r"\(2, 3\), \(2,\), 1 classes"),
        (LinearHead("a", torch.ones(2, 3), torch.ones(3), ["one", "two"], {}), "contradicts itself"),
        (LinearHead("a", torch.full((1, 3), torch.nan), torch.ones(1), ["one"], {}), "not finite"),
    ):
        with pytest.raises(CareHubError, match=sentence):
            LinearHead.load(head.save(tmp_path))


def test_a_head_is_not_saved_beside_a_damaged_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CareHubError, match="not a care_hub configuration"):
        LinearHead("a", torch.ones(1, 3), torch.ones(1), ["one"], {}).save(tmp_path)
    assert not head_files(tmp_path)


def test_info_and_classify(export, photos, tmp_path):
    done = CliRunner().invoke(cli.main, ["info", str(export)])
    about = json.loads(done.output)
    assert about["linear_heads"]["shapes"]["top1"] == 61.5 and about["model"] == "resnet10_w16_small"
    done = CliRunner().invoke(cli.main, ["classify", str(photos / "test"), "--encoder", str(export)])
    rows = [line.split("\t") for line in done.output.strip().splitlines()]
    assert len(rows) == 16
    assert all(label.startswith("class ") and 0.1 <= float(p) <= 1 for _, label, p in rows)
    labels, probabilities = care_hub.load_classifier(export).classify(photos / "test")
    assert labels == [row[1] for row in rows]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    refused = CliRunner().invoke(cli.main, ["info", str(tmp_path / "absent")])
    assert refused.exit_code == 1 and "is not a folder" in refused.output

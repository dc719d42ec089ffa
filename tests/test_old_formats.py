"""What version 0.1.0 wrote still loads, and the same seeds still train the same weights.

tests/old holds an export (in float16) and a run folder of that version, made by

    train.py --batch-size 16 --equiv-splits 4 --projection-hidden 32 --projection-dim 16 --knn-bank 200
        --mixed-precision no --max-steps 4 --checkpoint-every 2 --lr 0.02 --momentum 0 --weight-decay 0
        --weight 0.3 --weight-warmup-epochs 0 --knn-every 1
"""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import OLD, care_hub_command, metrics
from safetensors.torch import load_file

import care_hub
from care_hub import encoder as encoder_module
from care_hub import models
from care_hub.config import TrainConfig, read_yaml
from care_hub.hub.evaluation_record import read_record

CHECKPOINT = OLD / "run" / "checkpoints" / "step-00000002" / "model.safetensors"


@pytest.fixture
def run(tmp_path):
    shutil.copytree(OLD / "run", tmp_path / "before")
    return tmp_path / "before"


def test_an_export_loads_with_its_head_and_its_record():
    encoder = care_hub.load_encoder(OLD / "export")
    images = np.random.RandomState(0).randint(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    expected = [-0.17101, 0.00392, -0.02412, -0.03951, 0.32986, -0.24284, -0.39984, 0.11818]
    np.testing.assert_allclose(encoder.encode(images)[0, :8], expected, atol=2e-4)
    assert encoder.config.training["grayscale"] == TrainConfig.grayscale
    assert encoder.config.training["blur_kernel_size"] == TrainConfig.blur_kernel_size
    assert care_hub.load_linear_head(OLD / "export").metrics["top1"] == 21.15
    geometry = read_record(OLD / "export")["equivariance"]["shapes"]
    assert {"projection", "backbone"} == geometry["attributes"].keys()
    assert "variance" in geometry["families"]["grayscale"]
    assert json.loads(care_hub_command("info", OLD / "export"))["accuracy"]["shapes"]["kNN"]["top1"] == 16.45
    rotation = care_hub.Rotation.load(OLD / "rotation.safetensors")
    rotation.check(encoder)
    assert rotation(encoder.encode(images)).shape == (4, 16)


def test_a_run_is_resumed_from_its_checkpoint(run):
    results = care_hub.train(TrainConfig(**read_yaml(run / "config.yaml") | {
        "save_root": str(run.parent), "run_name": run.name, "resume": True, "knn_every": 0}))  # fmt: skip
    assert results["training_seconds"] > 0
    rows = [row for row in metrics(run) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    before = [row["loss"] for row in metrics(OLD / "run") if "loss" in row]
    assert [row["loss"] for row in rows] == pytest.approx(before, rel=1e-3)


def test_equal_seeds_train_the_weights_of_the_version_before(tmp_path, monkeypatch):
    """Version 0.1.0 built every backbone twice and kept the second; then weights are the same."""

    def built_twice(model: str, image_size: int):
        models.build_backbone(model, image_size)
        return models.build_backbone(model, image_size)

    monkeypatch.setattr(encoder_module, "build_backbone", built_twice)
    options = read_yaml(OLD / "run" / "config.yaml") | {"max_steps": 2, "knn_every": 0}
    care_hub.train(TrainConfig(**options | {"save_root": str(tmp_path), "run_name": "again"}))
    found = load_file(tmp_path / "again" / "checkpoints" / "step-00000002" / "model.safetensors")
    expected = load_file(CHECKPOINT)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)

"""What full training reaches: `pytest -m slow`. Not part of plain `pytest`."""

import json

import pytest
from helpers import ROOT, run

pytestmark = pytest.mark.slow


def result(root, name, *flags) -> dict:
    run("python", ROOT / "train.py", "--save-root", root, "--run-name", name, *flags, timeout=3000)
    return json.loads((root / name / "results.json").read_text())


@pytest.mark.parametrize(("flags", "ratio"), [((), 0.75), (("--steering-head",), 0.5)])
def test_the_default_run_learns_shapes_and_rotates(flags, ratio, tmp_path):
    care, plain = result(tmp_path, "care", *flags), result(tmp_path, "plain", "--weight", "0")
    assert care["knn_top1"] >= 60
    assert care["rotation_invariance_ratio"] <= ratio * plain["rotation_invariance_ratio"]
    assert care["gram_deviation"] <= 0.5 * plain["gram_deviation"]


@pytest.mark.parametrize("flags", [(), ("--weight", "0")])
def test_moco_learns_shapes(flags, tmp_path):
    assert result(tmp_path, "moco", "--config", "shapes_moco", *flags)["knn_top1"] >= 45


def test_the_small_recipe_learns_real_cifar10(shared, tmp_path):
    flags = ("--config", "cifar10_small", "--data-root", shared("data/cifar10"))
    assert result(tmp_path, "cifar", *flags)["knn_top1"] >= 45

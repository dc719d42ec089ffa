"""Every recipe resolves, and trains two steps with its own model on stand-in pictures of the right size."""

import functools
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT, metrics
from PIL import Image

from care_hub import cli, figures, trainer
from care_hub.config import TrainConfig, read_yaml
from care_hub.data import sources

READ = functools.cache(sources._read)  # the stand-ins do not change between the plan and the run
RECIPES = sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A training picture for each class of ImageNet-100 and a test picture for ten, a little larger than `size`."""
    names = (ROOT / "care_hub" / "data" / "imagenet100.txt").read_text().split()

    @functools.cache
    def make(size: int):
        root, draw = tmp_path_factory.mktemp("data"), np.random.RandomState(0)
        for split, some in (("train", names), ("validation", names[:10])):
            for name in some:
                (root / split / name).mkdir(parents=True)
                small = draw.randint(0, 256, (6, 5, 3)).astype(np.uint8)
                Image.fromarray(small).resize((size + 16, size + 40)).save(root / split / name / "0.jpg")
        return root

    return make


def test_recipes_say_what_they_set():
    defaults = read_yaml(ROOT / "recipes" / "shapes.yaml")
    for name, value in defaults.items():
        assert getattr(TrainConfig(), name) == (tuple(value) if isinstance(value, list) else value), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe, stand_ins, tmp_path, monkeypatch):
    values = read_yaml(ROOT / "recipes" / f"{recipe}.yaml")
    monkeypatch.setattr(figures, "neighbours", lambda *_: None)  # sheets have tests of their own
    data = []
    if values["dataset_name"] != "shapes":
        size = sources.spec(values["dataset_name"]).size
        data = ["--data-root", str(stand_ins(size)), "--num-workers", "0"]
        monkeypatch.setattr(sources, "_read", READ)
        monkeypatch.setattr(sources, "HELD_BYTES", 0 if size > 100 else sources.HELD_BYTES)
        about = sources.SPECS[values["dataset_name"]]
        layout = replace(about, image="image", label="label", train="train")  # stand-ins are class folders
        monkeypatch.setitem(sources.SPECS, values["dataset_name"], layout)
    words = ["--config", str(ROOT / "recipes" / f"{recipe}.yaml"), "--save-root", str(tmp_path / "runs"), "--run-name", "r", *data]
    words += ["--batch-size", "8", "--equiv-splits", "2"]
    if "equivariant_batch_size" in values:
        words += ["--equivariant-batch-size", "4"]
    if values.get("method") == "moco":
        words += ["--queue-size", "64"]
    plan = CliRunner().invoke(cli.train, [*words, "--dry-run"])
    assert plan.exit_code == 0, plan.output
    for word in (values.get("model", "resnet10_w16_small"), "steps of 8 images", "8 images per process, 2 groups", "learning rate", "GiB"):
        assert word in plan.output
    assert not (tmp_path / "runs").exists()
    if recipe == "shapes":
        return  # the defaults: every other test trains them
    done = CliRunner().invoke(cli.train, [*words, "--max-steps", "2"])
    assert done.exit_code == 0, done.output
    assert len(metrics(tmp_path / "runs" / "r")) == 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_as_published_divides(recipe):
    config = TrainConfig(**read_yaml(ROOT / "recipes" / f"{recipe}.yaml"))
    for processes in (1, 2, 4):
        config.check_processes(processes)


def test_any_timm_backbone_trains_also_a_vision_transformer(photos, tmp_path):
    flags = ["--dataset-name", "imagefolder", "--data-root", str(photos), "--save-root", str(tmp_path), "--run-name", "r"]
    flags += ["--batch-size", "8", "--equiv-splits", "2", "--max-steps", "2", "--model", "vit_tiny_patch16_224"]
    done = CliRunner().invoke(cli.train, [*flags, "--image-size", "48", "--optimizer", "adamw", "--lr", "0.001"])
    assert done.exit_code == 0, done.output
    assert trainer.Encoder.from_pretrained(tmp_path / "r").backbone.patch_embed.img_size == (48, 48)
    refused = CliRunner().invoke(cli.train, [*flags, "--image-size", "40", "--run-name", "s"])
    assert refused.exit_code == 1 and "patches of 16 pixels, which do not fill 40; use --image-size 32" in refused.output

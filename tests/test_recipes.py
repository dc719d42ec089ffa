"""Every recipe resolves, and trains two steps with its own model on stand-in images of the right size.

Those of large networks take a minute together; they train where slow tests are run.
"""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import ROOT, command, metrics
from PIL import Image

from care_hub import cli
from care_hub.config import AUGMENTATION, TrainConfig, plain_values, read_yaml, recipes
from care_hub.data import sources
from care_hub.encoder import Encoder
from care_hub.training import run

RECIPES = sorted(recipes())
SMALL = ("cifar10_modern", "cifar10_small", "shapes", "shapes_moco")
BEFORE = json.loads((ROOT / "tests" / "recipes.json").read_text())  # what they resolved to in November 2026
AS_BEFORE = {"weight_start_epochs": 0, "flip": 0.5, **{f"equivariance_{k}": None for k in AUGMENTATION}}
AS_BEFORE |= {"steering_head": False}
OF_STEERING_HEAD = {"steering_uniformity", "steering_temperature"}  # without which they say nothing
OF_A_START = {"init", "freeze_backbone"}  # which is no recipe's


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A training image per class of ImageNet-100 and a test image for ten, a little larger than `size`."""
    names = (ROOT / "care_hub" / "data" / "imagenet100.txt").read_text().split()

    @functools.cache
    def make(size: int):
        root, random = tmp_path_factory.mktemp("data"), np.random.RandomState(0)
        for split, some in (("train", names), ("validation", names[:10])):
            for name in some:
                (root / split / name).mkdir(parents=True)
                small = random.randint(0, 256, (6, 5, 3)).astype(np.uint8)
                Image.fromarray(small).resize((size + 16, size + 40)).save(root / split / name / "0.jpg")
        return root

    return make


@pytest.fixture(scope="module")
def read_once():
    """`sources._read_splits` that reads a folder once: it does not change between the plan and the run."""
    read, known = sources._read_splits, {}

    def once(data, spec):
        key = (data.data_root, data.dataset_name)
        if key not in known:
            known[key] = read(data, spec)
        return known[key]

    return once


def test_recipes_say_what_they_set():
    defaults = read_yaml("shapes")
    for name, value in defaults.items():
        assert getattr(TrainConfig(), name) == (tuple(value) if isinstance(value, list) else value), name


@pytest.mark.parametrize("recipe", BEFORE)
def test_a_recipe_is_what_it_was_whatever_becomes_of_the_defaults(recipe):
    """Options that are newer are stated in the file, with the values that change nothing."""
    stated = read_yaml(recipe)
    options, before = plain_values(TrainConfig(**stated).published()), BEFORE[recipe]
    assert {name: options[name] for name in before} == before
    newer = options.keys() - before.keys() - OF_STEERING_HEAD - OF_A_START
    assert {name: stated.get(name, "not stated") for name in newer} == AS_BEFORE
    assert "equivariance_crop" in stated


@pytest.fixture
def words(request, stand_ins, read_once, tmp_path, monkeypatch):
    """The flags that train a recipe on stand-ins, in batches of 8."""
    recipe = request.param
    values = read_yaml(recipe)
    monkeypatch.setattr(run, "plot_neighbors", lambda *_: None)  # sheets have tests of their own
    words = ["--config", recipe, "--save-root", tmp_path / "runs", "--run-name", "r"]
    words += ["--batch-size", 8, "--equiv-splits", 2]
    name = values["dataset_name"]
    if name != "shapes":
        size = sources.dataset_spec(name).size
        words += ["--data-root", stand_ins(size), "--num-workers", 0]
        monkeypatch.setattr(sources, "_read_splits", read_once)
        monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0 if size > 100 else sources.IN_MEMORY_BYTES)
        layout = replace(sources.SPECS[name], image="image", label="label", train="train")  # class folders
        monkeypatch.setitem(sources.SPECS, name, layout)
    if "equivariant_batch_size" in values:
        words += ["--equivariant-batch-size", 4]
    if values.get("method") == "moco":
        words += ["--queue-size", 64]
    return words


@pytest.mark.launches
@pytest.mark.parametrize(("recipe", "words"), [(name, name) for name in RECIPES], indirect=["words"])
def test_a_recipe_is_planned_with_its_network(recipe, words, tmp_path):
    plan = command(cli.train, *words, "--dry-run")
    assert read_yaml(recipe).get("model", "resnet10_w16_small") in plan
    for word in ("steps of 8 images", "8 images per process, 2 groups", "learning rate", "GiB"):
        assert word in plan
    assert not (tmp_path / "runs").exists()


@pytest.mark.launches
@pytest.mark.parametrize(
    "words",
    [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES],
    indirect=True,
)
def test_a_recipe_trains(words, tmp_path):
    command(cli.train, *words, "--max-steps", 2)
    assert len(metrics(tmp_path / "runs" / "r")) == 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_as_published_divides(recipe):
    config = TrainConfig(**read_yaml(recipe))
    for processes in (1, 2) if recipe == "cifar10_small" else (1, 2, 4):  # which is for two cores
        config.check_processes(processes)


@pytest.mark.launches
def test_any_timm_backbone_trains_also_a_vision_transformer(photos, tmp_path):
    flags = [
        "--dataset-name",
        "imagefolder",
        "--data-root",
        photos,
        "--save-root",
        tmp_path,
        "--run-name",
        "r",
    ]
    flags += ["--batch-size", 8, "--equiv-splits", 2, "--max-steps", 2, "--model", "vit_tiny_patch16_224"]
    command(cli.train, *flags, "--image-size", 48, "--optimizer", "adamw", "--lr", 0.001)
    assert Encoder.from_pretrained(tmp_path / "r").backbone.patch_embed.img_size == (48, 48)
    refused = command(cli.train, *flags, "--image-size", 40, "--run-name", "s", ok=False)
    assert "patches of 16 pixels, which do not fill 40; use --image-size 32" in refused

"""`care-hub verify`: a true card is reproduced, what was changed is named, what can't be measured is said."""

import json
import shutil
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from helpers import care_hub_command, eval_linear, train_here

from care_hub import cli
from care_hub.augment import AugmentationConfig
from care_hub.config import plain_values
from care_hub.evaluate import commands
from care_hub.hub.linear_head import LinearHead
from care_hub.hub.rotation_set import RotationSet
from care_hub.steering import fitting
from care_hub.verify import _recipe

pytestmark = pytest.mark.launches


def verify(encoder, *words, status: int) -> str:
    done = CliRunner().invoke(cli.main, ["verify", *map(str, (encoder, *words))])
    assert done.exit_code == status, done.output
    return done.output


def rows(table: str, verdict: str) -> list[str]:
    """The names of the figures of such a verdict."""
    return [line.split("  ")[0] for line in table.splitlines() if line.endswith(f" {verdict}")]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Three families of augmentations are enough, and figures are the slowest of all and not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        few = partial(commands.measure_equivariance, families=["crop", "hue", "blur"])
        patch.setattr(commands, "measure_equivariance", few)
        patch.setattr(commands, "plot_geometry", lambda *_: None)
        patch.setattr(fitting, "plot_rotations", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def measured(photos, tmp_path_factory):
    """The run folder of an encoder of photos on which everything was measured that a card can state."""
    root = tmp_path_factory.mktemp("measured")
    data = ("--dataset-name", "imagefolder", "--data-root", photos)
    size = ("--image-size", "32", "--max-steps", "2", "--knn-every", "1")
    train_here(root, *data, *size, "--run-name", "a")
    eval_linear(root / "a", *data)
    few = ("--label-fraction", "0.5", "--seeds", "2")
    eval_linear(root / "a", *data, *few, "--protocol", "sgd", "--epochs", "3", "--augmented-copies", "2")
    care_hub_command("knn", root / "a", *data, "--k", "3", "--bank", "20")
    care_hub_command("equivariance", root / "a", *data, "--images", "12", "--draws", "2", "--seed", "1")
    care_hub_command("rotations", root / "a", *data, "--transform", "brightness=0.7,1.4", "--seed", "2")
    care_hub_command("rotations", root / "a", "--images", photos / "train", "--transform", "flip")
    return root / "a"


def test_a_true_card_is_reproduced(measured, photos):
    before = {path: path.stat().st_mtime_ns for path in measured.rglob("*")}
    said = verify(measured, "--data-root", photos, "--data-root", photos / "train", status=0)
    found = rows(said, "ok")
    for name in (
        f"{photos.name}: final, rotation error",
        f"{photos.name}: linear probe, top-1",
        f"{photos.name}: linear probe (adam), 50 % of the labels, top-1, deviation",
        f"{photos.name}: kNN, top-1",
        f"{photos.name}: stored head, top-5",
        f"{photos.name}: hue, motion",
        f"{photos.name}: backbone, saturation",
        f"{photos.name}: rotations by brightness, cosine, R f(x)",
        "train: rotations by flip, motion",
    ):
        assert name in found
    assert "none differ" in said and "Not measured here" not in said and not rows(said, "differs")
    assert "only training can tell: training_seconds, images_per_second" in said
    assert {path: path.stat().st_mtime_ns for path in measured.rglob("*")} == before


def test_whatever_was_changed_is_named(measured, photos, tmp_path):
    export = shutil.copytree(measured / "export", tmp_path / "export")
    record = json.loads((export / "evaluation.json").read_text())
    record["results"]["accuracy"][photos.name]["kNN"]["top1"] += 0.2
    families = record["results"]["equivariance"][photos.name]["families"]
    families["hue"]["motion"][0] *= 1.02
    families["crop"]["variance"][1] *= 1.02  # which the card does not show
    families["blur"]["motion"][0] *= 1.005  # which is near enough
    (export / "evaluation.json").write_text(json.dumps(record))
    config = json.loads((export / "config.json").read_text())
    config["care"]["results"]["gram_deviation"] *= 0.97
    (export / "config.json").write_text(json.dumps(config))
    head = LinearHead.load(export / f"linear_head.{photos.name}.safetensors")
    replace(head, metrics=head.metrics | {"top1": head.metrics["top1"] + 0.11}).save(export)
    rotations = RotationSet.load(export / "rotations.safetensors")
    rotations.matrices["flip"] = torch.eye(rotations.matrices["flip"].shape[-1])[None]
    rotations.save(export)
    card = (export / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| saturation |"))
    changed = row.replace("| saturation | ", "| saturation | 1")
    (export / "README.md").write_text(card.replace(row, changed))
    said = verify(export, "--data-root", photos, "--data-root", f"train={photos / 'train'}", status=1)
    flip = [name for name in rows(said, "differs") if "rotations by flip" in name]
    assert "train: rotations by flip, same image, found by R f(x)" in flip
    assert sorted({*rows(said, "differs")} - {*flip}) == [
        f"{photos.name}: crop, variance",
        f"{photos.name}: final, Gram deviation",
        f"{photos.name}: hue, motion",
        f"{photos.name}: kNN, top-1",
        f"{photos.name}: stored head, top-1",
    ]
    assert f"The card says otherwise than the files beside it: {changed}" in said
    assert "beside it: | brightness |" not in said


def test_what_can_not_be_measured_here_is_said(measured, photos, tmp_path):
    said = verify(measured, status=3)
    assert f"{photos.name} (no copy at hand; not public); train (no copy at hand; not public)." in said
    said = verify("resnet10_w16_small.care_cifar10_color", status=3)
    assert "cifar10 (no copy at hand; it is 'uoft-cs/cifar10' on the Hub)." in said
    fewer = shutil.copytree(photos, tmp_path / photos.name)
    next((fewer / "test" / "warm").iterdir()).unlink()
    said = verify(measured, "--data-root", fewer, status=3)
    assert "measured on 16 test images, of which there are 15 here" in said


def test_a_fine_tuned_encoder_is_judged_by_its_stored_head(measured, photos, tmp_path):
    data = ("--dataset-name", "imagefolder", "--data-root", photos, "--protocol", "finetune", "--epochs", "1")
    for name, seeds in (("one", "1"), ("two", "2")):
        eval_linear(measured, *data, "--seeds", seeds, "--output-dir", tmp_path / name)
    said = verify(tmp_path / "one", "--data-root", photos, status=0)
    assert f"{photos.name}: fine-tuned, top-1" in rows(said, "ok")
    said = verify(tmp_path / "two", "--data-root", photos, status=3)
    assert f"{photos.name}, fine-tuned (fine-tuning began with other weights)" in said


def test_copies_are_told_apart_by_name(measured, photos):
    for given, sentence in (
        (photos / "test", f"'{photos / 'test'}' is of no data set of the card ({photos.name}, train); give"),
        (f"train={photos / 'x'}", f"--data-root '{photos / 'x'}' is not a folder"),
    ):
        assert sentence in verify(measured, "--data-root", given, status=1)


def test_the_augmentation_of_another_encoder_is_recorded_as_it_is():
    recipe = AugmentationConfig(64, scale=(0.4, 1.0), jitter=(0.1, 0.2, 0.3, 0.5))
    assert _recipe(json.loads(json.dumps(plain_values(asdict(recipe))))) == recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, data",
    [
        ("resnet10_w16_small.care_shapes", None),
        ("resnet10_w32_small.care_cifar10", "data/cifar10"),
        ("resnet10_w16_small.care_cifar10_color", "data/cifar10"),
        ("resnet10_w32_small.care_clothing", "data/clothing"),
        ("resnet10_w32_small.simclr_cifar10", "data/cifar10"),
    ],
)
def test_the_cards_of_the_package_are_true(name, data, shared):
    said = verify(name, *(("--data-root", shared(data)) if data else ()), status=0)
    assert rows(said, "ok")

"""`care-hub rotations`: encoders whose answer is known, and what the command writes, adds and refuses."""

import logging
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import care_hub_command, command, visible
from PIL import Image

import care_hub
from care_hub import cli
from care_hub.config import DataConfig
from care_hub.errors import CareHubError
from care_hub.hub.rotation_set import FILE_NAME, RotationSet
from care_hub.steering import fitting
from care_hub.steering.fitting import fit_transformation, rotations
from care_hub.transformations import parse


def light(x):
    """Turns in a plane by the logarithm of the light, beside its pattern: brighter is exactly a rotation."""
    x = x.double()
    turn = 2 * x.mean(dim=(1, 2, 3)).log()
    plane = torch.stack([turn.cos(), turn.sin()], dim=1)
    return (plane[:, :, None] * pattern(x)[:, None]).flatten(1).float()


def pattern(x):
    """Does not see how bright an image is."""
    return F.normalize((x / x.mean(dim=(1, 2, 3), keepdim=True) - 1).flatten(1).double(), dim=1).float()


def pixels_themselves(x):
    return F.normalize(x.flatten(1) - 0.5, dim=1)


def noise(n, side=3, most=256):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, most, (n, 3, side, side), generator=generator, dtype=torch.uint8)


def fit(embed, images, asked):
    """A set of rotations of an encoder, and the measures over all strengths."""

    def embed_after(images, *steps):
        x = images.float() / 255
        for step in steps:
            x = step(x)
        return embed(x)

    found, matrices, moved = fit_transformation(embed_after, images, embed_after(images), *parse(asked))
    means = {name: mean for name, (mean, _, _) in found.overall.items()}
    one = RotationSet({found.name: found}, {found.name: matrices}, moved={found.name: moved})
    return one, found, means


def test_an_encoder_that_rotates_exactly_is_steerable_at_every_strength():
    images = noise(400, most=100)  # so dark that nothing is cut off
    found, about, means = fit(light, images, "brightness=0.5,0.7,1.4,2")
    assert about.candidates == 50 and about.steerable and about.images == 400
    assert means["same_image_hit_at_1"] > 98 and means["same_image_hit_at_1_unrotated"] < 2
    assert means["cosine"] > 0.9999 and means["cosine_unrotated"] < 0.8 and means["motion"] > 0.1
    assert means["cosine_between"] > 0.9999 and set(about.measured[0]) < set(about.overall)
    x = images.float() / 255
    for strength in (0.6, 0.9, 1.2, 1.7):  # never fitted
        led = found["brightness", strength](light(x))
        torch.testing.assert_close(led, light(x * strength), atol=1e-3, rtol=0)
    assert (torch.linalg.det(found.matrices["brightness"]) > 0).all()


def test_what_moves_is_found():
    """Of 27 numbers and two that tell the light, only these two move, on a circle."""

    def embed(x):
        x = x.double()
        turn = 2 * x.mean(dim=(1, 2, 3)).log()
        return F.normalize(torch.cat([turn.cos()[:, None], turn.sin()[:, None], pattern(x)], dim=1)).float()

    found, _, _ = fit(embed, noise(200, most=100), "brightness=0.5,0.7,1.4,2")
    first_two = torch.diag((torch.arange(29) < 2).double())
    torch.testing.assert_close(found.projector(match=["brightness"]), first_two, atol=1e-4, rtol=0)


def test_an_encoder_that_is_invariant_is_not_steerable():
    _, about, means = fit(pattern, noise(160, most=100), "brightness=0.7,1.4")
    assert not about.steerable
    for suffix in ("", "_unrotated", "_linear"):
        assert means[f"same_image_hit_at_1{suffix}"] == pytest.approx(2)
    assert means["same_image_mrr"] == pytest.approx(sum(1 / k for k in range(1, 51)) / 50, rel=1e-4)


def test_a_switch_has_two_candidates_and_is_steerable_where_it_is_found():
    _, about, means = fit(pixels_themselves, noise(400, 4), "flip")
    assert about.candidates == 2 and means["same_image_hit_at_1"] > 99 and about.steerable
    _, about, means = fit(lambda x: pixels_themselves(x + x.flip(3)), noise(160, 4), "flip")
    assert means["same_image_hit_at_1"] == pytest.approx(50) and not about.steerable


def test_the_candidates_are_50_whatever_was_fitted():
    """Few fitted strengths must not make an encoder look good that knows only darker from brighter."""

    def side(x):
        return F.normalize(torch.stack([(x.mean(dim=(1, 2, 3)) > 0.2).float(), x[:, 0, 0, 0]], dim=1) + 0.1)

    for asked in ("brightness=0.5", "brightness=0.5,0.51,2"):
        assert fit(side, noise(100, most=100), asked)[1].candidates == 50


@pytest.fixture
def folder(export, photos):
    """An encoder, and images of which two folders have the same names."""
    after = export.parent / "after"
    for path in (photos / "train").rglob("*.png"):
        (after / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(path).point(lambda value: value // 2).save(after / path.parent.name / path.name)
    return export


@pytest.mark.launches
@pytest.mark.launches
def test_the_command_writes_rotations_table_figure_and_card_and_keeps_what_was_there(
    folder, photos, tmp_path
):
    before = visible(folder)
    said = care_hub_command(
        *("rotations", folder, "--images", photos / "train", "--transform", "brightness=0.5,1.4"),
        *("--transform", "brightness=1.4+flip=1", "--pairs", "darker", photos / "train", tmp_path / "after"),
    )
    assert "24 pairs are few for rotations in 16 dimensions" in said and "steered by:" in said
    found = care_hub.load_rotations(folder)
    assert list(found) == ["brightness", "brightness=1.4+flip=1", "darker"]
    assert found.encoder == care_hub.load_encoder(folder).fingerprint and found.space == "projection"
    for name, label, candidates in (("brightness", "train", 50), ("darker", "train to after", 2)):
        about = found.fitted[name]
        assert (about.dataset, about.images, about.candidates) == (label, 48, candidates)
        assert about.version == care_hub.__version__ and name in said
        for measured in (about.overall, *about.measured):
            for mean, low, high in measured.values():
                assert math.isfinite(mean) and low <= mean <= high
    assert "## Rotations" in (folder / "README.md").read_text()
    assert (folder / fitting.FIGURE).read_bytes().startswith(b"\x89PNG")
    now = visible(folder)
    assert {name: now[name] for name in before if name != "README.md"} == {
        name: content for name, content in before.items() if name != "README.md"
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "plot_rotations", lambda *_: None)
        care_hub_command("rotations", folder, "--images", photos, "--transform", "flip", "--limit", "8")
    again = care_hub.load_rotations(folder)
    assert list(again) == [*found, "flip"] and again.fitted["flip"].images == 8
    torch.testing.assert_close(again.matrices["brightness"], found.matrices["brightness"])


@pytest.fixture
def no_figure(monkeypatch):
    """Which takes longer than all the rest."""
    monkeypatch.setattr(fitting, "plot_rotations", lambda *_: None)


@pytest.mark.launches
@pytest.mark.launches
def test_pairs_may_be_files_of_embeddings(no_figure, folder, photos, tmp_path):
    embed = partial(care_hub_command, "embed", "--encoder", folder)
    embed(photos / "train", "-o", tmp_path / "a.parquet")
    embed(tmp_path / "after", "-o", tmp_path / "b.safetensors")
    files = rotations(
        str(folder), pairs=[("darker", *(str(tmp_path / x) for x in ("a.parquet", "b.safetensors")))]
    )
    folders = rotations(str(folder), pairs=[("darker", str(photos / "train"), str(tmp_path / "after"))])
    torch.testing.assert_close(files.matrices["darker"], folders.matrices["darker"], atol=1e-4, rtol=0)
    embed(photos / "train", "-o", tmp_path / "h.parquet", "--space", "backbone")
    sources = [str(tmp_path / x) for x in ("a.parquet", "h.parquet")]
    with pytest.raises(
        CareHubError, match=r"h.parquet' has embeddings of another encoder, or not of `space="
    ):
        rotations(str(folder), pairs=[("darker", *sources)])


@pytest.mark.launches
def test_an_encoder_that_is_no_folder_is_copied(no_figure, photos, tmp_path, caplog):
    name = "resnet10_w16_small.care_shapes"
    data = DataConfig("imagefolder", data_root=str(photos))
    with pytest.raises(CareHubError, match="results need an `output_dir`"):
        rotations(name, data=data)
    with caplog.at_level(logging.WARNING):
        rotations(name, data=data, transforms=["flip"], output_dir=str(tmp_path / "mine"))
    assert (
        "8 pairs are few for rotations in 128 dimensions; take 1,024 images" in caplog.text
    )  # of the test split
    found = care_hub.load_rotations(tmp_path / "mine")
    assert found.encoder == care_hub.load_encoder(tmp_path / "mine").fingerprint
    assert found.encoder_name == name and found.fitted["flip"].dataset == photos.name
    (tmp_path / "mine" / FILE_NAME).write_bytes(b"junk")
    with caplog.at_level(logging.WARNING):
        rotations(name, data=data, transforms=["flip"], output_dir=str(tmp_path / "mine"))
    assert "are replaced" in caplog.text and list(care_hub.load_rotations(tmp_path / "mine")) == ["flip"]


def test_without_a_projection_head_backbone_features_of_unit_length_are_rotated(no_figure, export, photos):
    (export / "projection.safetensors").unlink()
    found = rotations(str(export), images=str(photos), transforms=["flip"])
    assert found.space == "backbone" and found["flip", 1].d == 128
    assert "load_rotations" not in (export / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "Give images to fit rotations on: --images, a folder, or --dataset-name"),
        (("--images", "{photos}", "--dataset-name", "shapes"), "--images needs no --dataset-name"),
        (
            ("--images", "{photos}", "--transform", "hue", "--transform", "hue=0.1"),
            "'hue' is asked for twice",
        ),
        (("--images", "{photos}", "--pairs", "flip", "{photos}", "{photos}"), "'flip' is asked for twice"),
        (("--pairs", " ", "{photos}", "{photos}"), "no name for a transformation"),
        (("--pairs", "camera", "{photos}", "{photos}/test/cold"), "0 names in common"),
        (("--images", "{photos}", "--transform", "brightness=9"), "from 0.4 to 2.5"),
    ],
)
def test_what_can_not_be_fitted_ends_in_one_sentence(words, sentence, export, photos):
    said = command(cli.main, "rotations", export, *(word.format(photos=photos) for word in words), ok=False)
    assert sentence in said and said.count("Error:") == 1
    assert FILE_NAME not in visible(export)

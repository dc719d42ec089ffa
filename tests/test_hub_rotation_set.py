"""Named rotations: a file beside the encoder to which they belong, and what lies between its fits."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import GOOD, IMAGES, TURN, care_hub_command, fitted, snippets, stored
from safetensors.torch import load_file

import care_hub
from care_hub.errors import CareHubError
from care_hub.factory import push_export
from care_hub.files import write_tensors
from care_hub.hub.card import write_card
from care_hub.hub.export import content_sum
from care_hub.hub.rotation_set import FILE_NAME
from care_hub.rotation import Rotation


def close(one: Rotation, other: Rotation) -> None:
    torch.testing.assert_close(one.matrix, other.matrix, atol=1e-6, rtol=0)


def test_rotations_come_back_as_they_were_saved(rotations, export):
    path = rotations.save(export)
    found = care_hub.load_rotations(export)
    assert path == export / FILE_NAME and list(found) == ["brightness", "flip"] and len(found) == 2
    assert found.fitted["brightness"].strengths == rotations.fitted["brightness"].strengths
    assert found.fitted["brightness"].overall["cosine"] == list(GOOD["cosine"])
    assert found.steerable == ["brightness"]
    close(found["brightness", 0.5], TURN.inv())
    found["brightness", 2].check(care_hub.load_encoder(export))
    with pytest.raises(CareHubError, match="another encoder"):
        found["brightness", 2].check("0" * 64)


def test_in_half_precision_they_take_a_quarter_and_are_rotations_still(rotations, export):
    d = 64
    turns = torch.stack([Rotation.random(d, k).matrix for k in range(3)])
    mirrors = torch.diag(torch.tensor([-1.0, -1] + [1] * (d - 2)))[None]  # half a turn
    rotations = replace(rotations, matrices={"brightness": turns, "flip": mirrors})
    rotations.moved = {name: Rotation.random(d, 9).matrix[:, :20] for name in rotations}
    whole = rotations.save(export).stat().st_size
    path = rotations.save(export, half=True)
    found = care_hub.load_rotations(export)
    assert path.stat().st_size < 0.35 * whole
    for name, matrices in rotations.matrices.items():
        torch.testing.assert_close(found.matrices[name], matrices.double(), atol=2e-3, rtol=0)
        assert (found.projector([name]) - rotations.projector([name])).abs().max() < 1e-3
    assert found["brightness", 1.2] and found.add_to(export)  # as any others; written whole
    close(care_hub.load_rotations(export)["brightness", 2], found["brightness", 2])


def test_strengths_in_between_lie_on_the_geodesic(rotations):
    for strength, share in ((2.0, 1), (2**0.75, 0.75), (2**0.25, 0.25), (1, 0), (2**-0.5, -0.5)):
        close(rotations["brightness", strength], TURN.power(share))
    close(rotations["brightness", 2.0] @ rotations["brightness", 0.5], Rotation(torch.eye(16)))
    close(rotations["brightness", 2**0.5].inv(), rotations["brightness", 2**-0.5])
    close(rotations["flip", 0], Rotation(torch.eye(16)))


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        (("brightnes", 2), "did you mean 'brightness'"),
        (("hue", 0.1), "has those of brightness, flip"),
        (("brightness", 2.1), "go from 0.5 to 2"),
        (("brightness", float("nan")), "go from 0.5 to 2"),
        (("flip", 0.5), "is on .1. or off"),
        ("brightness", "a transformation and a strength, as in"),
        (("brightness", "2"), "a transformation and a strength, as in"),
    ],
)
def test_what_was_not_fitted_is_refused(rotations, key, sentence):
    with pytest.raises(CareHubError, match=sentence):
        rotations[key]


@pytest.mark.parametrize(
    ("measures", "candidates", "steerable"),
    [
        ({}, 50, True),
        ({"same_image_hit_at_1": (8, 6.0, 9)}, 50, True),
        ({"same_image_hit_at_1": (8, 5.9, 9)}, 50, False),  # below three times chance
        ({"same_image_hit_at_1_unrotated": (17, 16, 18)}, 50, False),  # below 1.5 times that of f(x)
        ({"cosine": (0.59, 0.5, 0.7)}, 50, False),
        ({"cosine": (None, None, None)}, 50, False),
        ({"same_image_hit_at_1": (80, 75.0, 90)}, 2, True),
        ({"same_image_hit_at_1": (80, 74.0, 90)}, 2, False),
    ],
)
def test_steerable_is_what_the_bounds_say(measures, candidates, steerable):
    assert fitted("hue", [0.1], 0.0, "linear", GOOD | measures, candidates).steerable == steerable
    assert not fitted("hue", [0.1], 0.0, "linear", {}, candidates).steerable


def test_rotations_of_other_weights_are_refused(rotations, export):
    with pytest.raises(CareHubError, match=r"has no rotations.safetensors; fit them with"):
        care_hub.load_rotations(export)
    replace(rotations, weights={"projection.safetensors": "0" * 64}).save(export)
    with pytest.raises(CareHubError, match="fitted on other weights"):
        care_hub.load_rotations(export)
    with pytest.raises(CareHubError, match="different embedding spaces"):
        rotations.updated(replace(rotations, encoder="0" * 64))


def test_what_a_transformation_moves_is_projected_out_or_alone_kept(rotations, export):
    """Here brightness moves the first three numbers, flip the third and the fourth."""
    z = torch.nn.functional.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    for ignore, match, kept in (
        (["brightness"], [], range(3, 16)),
        (["brightness", "flip"], [], range(4, 16)),
        ([], ["brightness"], range(3)),
        (["flip"], ["brightness"], range(2)),
    ):
        expected = torch.zeros(5, 16)
        expected[:, list(kept)] = z[:, list(kept)]
        expected = torch.nn.functional.normalize(expected, dim=1)
        found = rotations.project(z, ignore, match)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        turned = rotations.project(z.numpy(), ignore, match)
        torch.testing.assert_close(torch.from_numpy(turned), expected, atol=1e-6, rtol=0)
    with pytest.raises(
        CareHubError, match="nothing is left to compare: brightness, flip moves all that there is"
    ):
        rotations.project(z, ["brightness", "flip"], ["flip"])
    with pytest.raises(CareHubError, match="no rotations of 'hue'"):
        rotations.project(z, ["hue"])
    encoder, images = care_hub.load_encoder(export), IMAGES
    with pytest.raises(CareHubError, match="has no rotations"):
        encoder.encode(images, ignore=["flip"])
    rotations.save(export)
    expected = rotations.project(encoder.encode(images), ["flip"])
    found = encoder.encode(images, ignore=["flip"])
    torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected))
    assert encoder.encode(images, ignore=["flip"], convert_to_tensor=True).dtype == torch.float32
    with pytest.raises(CareHubError, match="of other embeddings"):
        encoder.encode(images, space="backbone", ignore=["flip"])
    with pytest.raises(CareHubError, match="not loaded from a folder"):
        care_hub.Encoder.new("resnet10_w16_small").encode(images, ignore=["flip"])


HOSTILE = [
    lambda entry: entry | {"strengths": [2.0, 0.5, 1.5]},
    lambda entry: entry | {"strengths": [-0.5, 1.5, 2.0]},
    lambda entry: entry | {"strengths": [0.5, 1.0, 2.0]},
    lambda entry: entry | {"strengths": [0.5, 2.0]},
    lambda entry: entry | {"strengths": [0.5, 1.5, "2"]},
    lambda entry: entry | {"strengths": []},
    lambda entry: entry | {"scale": "cubic"},
    lambda entry: entry | {"candidates": 0},
    lambda entry: entry | {"overall": {"cosine": ["<b>", 0, 0]}},
    lambda entry: entry | {"name": "flip"},
    lambda entry: entry | {"name": "absent"},
    lambda entry: {k: v for k, v in entry.items() if k != "neutral"},
    lambda entry: [],
]


@pytest.mark.parametrize("change", HOSTILE)
def test_a_strangers_file_that_makes_no_sense_is_refused(change, rotations, export):
    path = rotations.save(export)
    rewrite(path, lambda entries: [change(entries[0]), *entries[1:]])
    with pytest.raises(CareHubError, match="is not a set of rotations of care_hub"):
        care_hub.load_rotations(export)


def rewrite(path, change=lambda entries: entries, **tensors):
    """The file with other metadata, or other tensors, and a sum that fits."""
    about = {}
    with open(path, "rb") as file:
        about = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    about["fitted"] = json.dumps(change(json.loads(about["fitted"])))
    values = load_file(path) | tensors
    about["sha256"] = content_sum([values[name] for name in sorted(values)], about)
    write_tensors(path, values, about)


@pytest.mark.parametrize(
    ("matrices", "sentence"),
    [
        (torch.ones(3, 16, 16), "not orthogonal"),
        (torch.full((3, 16, 16), torch.nan), "not finite"),
        (torch.eye(16)[:2].expand(3, 2, 16), "does not fit"),
        (torch.eye(17).expand(3, 17, 17), "does not fit"),
        (torch.eye(16).expand(2, 16, 16), "does not fit"),
        (torch.ones(()), "is not a set of rotations"),
        (torch.cat([-torch.eye(16)[:1], torch.eye(16)[1:]]).expand(3, 16, 16), "determinant -1"),
    ],
)
def test_tensors_that_are_no_rotations_are_refused(matrices, sentence, rotations, export):
    path = rotations.save(export)
    rewrite(path, **{"rotation.brightness": matrices.contiguous()})
    with pytest.raises(CareHubError, match=sentence):
        care_hub.load_rotations(export)


@pytest.mark.parametrize(
    ("moved", "sentence"),
    [
        (torch.ones(16, 2), "not orthonormal"),
        (torch.eye(16)[:, :0], "is not a set of rotations"),
        (torch.ones(16), "does not fit"),
        (torch.eye(17)[:, :2], "does not fit"),
    ],
)
def test_a_basis_that_is_none_is_refused(moved, sentence, rotations, export):
    path = rotations.save(export)
    rewrite(path, **{"moved.brightness": moved.contiguous()})
    with pytest.raises(CareHubError, match=sentence):
        care_hub.load_rotations(export)


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        ("log.brightness", torch.ones(3, 119), "does not fit"),
        ("log.brightness", torch.ones(2, 120), "does not fit"),
        ("log.brightness", torch.full((3, 120), torch.inf), "not finite"),
        ("log.brightness", torch.ones(()), "is not a set of rotations"),
        ("moved.brightness", torch.ones(16, 2), "not orthonormal"),
    ],
)
def test_half_precision_is_trusted_no_more(name, values, sentence, rotations, export):
    path = rotations.save(export, half=True)
    rewrite(path, **{name: values.half()})
    with pytest.raises(CareHubError, match=sentence):
        care_hub.load_rotations(export)


def test_damage_is_noticed_and_what_newer_versions_add_is_not_in_the_way(rotations, export):
    path = rotations.save(export)
    content = path.read_bytes()
    for damaged in (
        content[:-100],
        content[:-1] + bytes([content[-1] ^ 1]),
        content.replace(b"31.0", b"91.0"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(CareHubError, match=r"damaged|complete"):
            care_hub.load_rotations(export)
    path.write_bytes(content)
    rewrite(path, lambda entries: [entry | {"news": [1]} for entry in entries])
    assert list(care_hub.load_rotations(export)) == ["brightness", "flip"]


@pytest.mark.launches
@pytest.mark.launches
def test_card_info_and_push_know_them(rotations, export, server):
    rotations.save(export)
    card = write_card(export).read_text()
    assert "| brightness | 0.5, 1.41421, 2 (a factor) | yes | - | 31 (25 to 37) |" in card
    assert "| flip | 1 (a factor) | no |" in card
    namespace: dict = {}
    for code in (snippets(card)[0], snippets(card)[3]):
        exec(code, namespace)
    assert namespace["z_turned"].shape == namespace["z"].shape
    about = json.loads(care_hub_command("info", export))["rotations"]
    assert about["brightness"]["steerable"] and not about["flip"]["steerable"]
    push_export(export, "alice/turning")
    assert stored(server, "alice/turning")[FILE_NAME] == (export / FILE_NAME).read_bytes()
    close(care_hub.load_rotations("alice/turning")["brightness", 2.0], TURN)
    (export / FILE_NAME).write_bytes(b"junk")
    with pytest.raises(CareHubError, match=FILE_NAME):
        push_export(export, "alice/turning")

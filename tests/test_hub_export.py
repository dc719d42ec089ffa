"""The export folder: written whole or not at all, and nothing in it is believed."""

import json
import re

import pytest
import torch
from campaigns.hostile import try_folders, try_values, try_words
from helpers import ROOT, edited, killed_at_each_rename, visible, with_weights
from safetensors.torch import save

import care_hub
from care_hub import files
from care_hub.config import ProjectionConfig
from care_hub.errors import CareHubError
from care_hub.files import check_tensors, own_file, read_header, read_tensors
from care_hub.hub.export import (
    check_sums,
    copy_export,
    export_folder,
    folder_lock,
    projection_of,
    read_config,
)


def care(**values):
    """Change entries of the `care` object."""
    return lambda config: config["care"].update(values)


def in_both(**values):
    """Change entries of the `care` object and, alike, of timm's part."""
    return lambda config: [config[part].update(values) for part in ("care", "pretrained_cfg")]


def unchanged(config):
    """As it is."""


NO_CONFIG = "not a care_hub configuration"
WIDE = {"inputs": 128, "hidden": 10**12, "outputs": 16, "norm": True}
HOSTILE = {
    "pickled weights only": (
        lambda e: {"config.json": (e / "config.json").read_bytes(), "pytorch_model.bin": b"\x80\x02"},
        "contains no care_hub encoder",
    ),
    "absurd image size": (lambda e: edited(e, care(image_size=10**6)), NO_CONFIG),
    "a crop that asks for a huge image": (lambda e: edited(e, in_both(crop_pct=1e-6)), NO_CONFIG),
    "division by nothing": (lambda e: edited(e, in_both(std=[0, 0, 0])), NO_CONFIG),
    "two means and four deviations": (lambda e: edited(e, in_both(mean=[0, 0], std=[1] * 4)), NO_CONFIG),
    "a mean that is no number": (lambda e: edited(e, in_both(mean=[0, 0, "0"])), NO_CONFIG),
    "a mean beyond all floats": (lambda e: edited(e, in_both(mean=[10**400, 0, 0])), NO_CONFIG),
    "absurd head": (
        lambda e: edited(e, lambda c: c["care"]["projection"].update(hidden=10**12)),
        NO_CONFIG,
    ),
    "a head of another form": (lambda e: edited(e, care(projection={"hidden": 7})), NO_CONFIG),
    "an absurd second head": (lambda e: edited(e, care(contrastive_head=WIDE)), NO_CONFIG),
    "results that are no numbers": (lambda e: edited(e, care(results={"knn_top1": "<b>"})), NO_CONFIG),
    "settings that are a list": (lambda e: edited(e, care(training=["lr"])), NO_CONFIG),
    "a weight in words": (lambda e: edited(e, care(weight="much")), NO_CONFIG),
    "another architecture": (
        lambda e: edited(e, lambda c: c.update(architecture="resnet50")),
        "contradicts itself",
    ),
    "other timm arguments": (
        lambda e: edited(e, lambda c: c["model_args"].update(channels=[10**6] * 4)),
        "contradicts itself",
    ),
    "unknown model": (lambda e: edited(e, care(model="hf-hub:evil/x")), "there is no model 'hf-hub:evil/x'"),
    "other weights": (lambda e: visible(e) | {"model.safetensors": save({"a": torch.ones(1)})}, "should be"),
    "weights cut short": (lambda e: visible(e) | {"projection.safetensors": b"\x08\x00"}, "not a complete"),
    "no sums, weights cut short": (
        lambda e: (
            edited(e, lambda c: c["care"].pop("sha256"))
            | {"model.safetensors": (e / "model.safetensors").read_bytes()[:5000]}
        ),
        "not a complete safetensors file",
    ),
    "tensors of another shape": (
        lambda e: with_weights(
            e, "model.safetensors", lambda t: t | {"layer1.0.conv1.weight": torch.ones(1, 1, 3, 3)}
        ),
        "should be",
    ),
    "a tensor missing": (
        lambda e: with_weights(
            e, "model.safetensors", lambda t: {k: v for k, v in t.items() if k != "bn1.bias"}
        ),
        "bn1.bias should be",
    ),
    "not a number": (
        lambda e: with_weights(
            e, "model.safetensors", lambda t: t | {"bn1.bias": t["bn1.bias"] * float("nan")}
        ),
        "not finite",
    ),
    "HTML instead of JSON": (
        lambda e: edited(e, unchanged) | {"config.json": b"<html>busy</html>"},
        NO_CONFIG,
    ),
    "a number instead of an object": (lambda e: edited(e, unchanged) | {"config.json": b"7"}, NO_CONFIG),
    "a list instead of `care`": (lambda e: edited(e, lambda c: c.update(care=[1])), NO_CONFIG),
    "endless configuration": (lambda e: edited(e, lambda c: c.update(x="x" * (2 << 20))), NO_CONFIG),
    "deep configuration": (lambda e: edited(e, unchanged) | {"config.json": b"[" * 500_000}, NO_CONFIG),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_repository_is_refused(kind, server, export, tmp_path):
    make, sentence = HOSTILE[kind]
    server.put("lab/evil", make(export))
    with pytest.raises(CareHubError, match=re.escape(sentence)):
        care_hub.load_encoder("lab/evil", cache_dir=tmp_path / "cache")


def test_the_load_path_can_not_unpickle():
    """No torch.load, pickle or strict=False anywhere but in the converter of foreign checkpoints."""
    for path in (ROOT / "care_hub").rglob("*.py"):
        text = re.sub(r"\bzip\(.*, strict=False\)", "", path.read_text())
        assert "strict=False" not in text and "allow_pickle=True" not in text
        if path.name != "convert.py":
            harmless = r"unpickled|Pickled weights|allow_pickle=False"
            assert "torch.load" not in text and "pickle" not in re.sub(harmless, "", text), path


def test_a_run_folder_stands_for_the_export_in_it(export, tmp_path):
    assert export_folder(export) == export_folder(tmp_path) == export
    with pytest.raises(CareHubError, match="not an export folder or a run folder with one"):
        export_folder(tmp_path / "elsewhere")


def test_the_configuration_comes_with_the_json_around_it(export):
    config, whole = read_config(export)
    assert (config.model, config.mean, config.weight) == ("resnet10_w16_small", (0.5, 0.5, 0.5), 0.3)
    assert config.projection == ProjectionConfig(128, 32, 16, norm=True)
    assert config.projection == projection_of(read_header(export / "projection.safetensors")[0])
    assert whole["architecture"] == "resnet18" and whole["care"] == config.to_json()


def test_former_names_of_options_are_understood(export):
    old = edited(export, care(training={"greyscale": 0.1, "blur_taps": 3, "lr": 0.2}))
    (export / "config.json").write_bytes(old["config.json"])
    config, _ = read_config(export)
    assert config.training == {"grayscale": 0.1, "blur_kernel_size": 3, "lr": 0.2}


def test_weights_of_something_else_are_no_projection_head():
    assert projection_of({"0.weight": torch.ones(2, 3)}) is None
    assert projection_of({"0.weight": torch.ones(2, 3), "2.weight": torch.ones(4, 2, 1)}) is None
    assert projection_of({"0.weight": torch.ones(2, 3), "2.weight": torch.ones(4, 2)}).norm is False


def test_a_damaged_file_is_told_from_a_missing_one(export):
    sums = read_config(export)[0].sha256
    check_sums(export, sums | {"absent.safetensors": "0"})
    with pytest.raises(CareHubError, match=r"absent.safetensors' is missing; the export is incomplete"):
        read_header(export / "absent.safetensors")
    with open(export / "projection.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(CareHubError, match=r"projection.safetensors' is not a complete"):
        check_sums(export, sums)


def test_a_copy_is_whole_once_it_is_an_export_and_leaves_what_is_there(export, tmp_path, monkeypatch):
    target = tmp_path / "copy"
    target.mkdir()
    (target / "evaluation.json").write_text("other results")
    for _ in killed_at_each_rename(lambda: copy_export(export, target), monkeypatch):
        if (target / "config.json").exists():
            care_hub.load_classifier(target)
    assert visible(target) == visible(export) | {"evaluation.json": b"other results"}


def test_a_lock_that_another_has(tmp_path):
    busy = pytest.raises(CareHubError, match="another process is writing")
    with folder_lock(tmp_path), busy, folder_lock(tmp_path, wait=False):
        pass
    with folder_lock(tmp_path, wait=False):
        pass


def test_config_json_is_indented_for_readers(export):
    assert (export / "config.json").read_text() == json.dumps(read_config(export)[1], indent=2) + "\n"


@pytest.mark.launches
@pytest.mark.parametrize("attempts, every", [(try_values, 23), (try_words, 100), (try_folders, 19)])
def test_some_of_the_hostile_values_words_and_folders(attempts, every, tmp_path, monkeypatch):
    """All of them: `python tests/campaigns/hostile.py`."""
    for name in ("HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.setenv(name, "")  # which are set there and reset after it
    failed = [f"{title}: {said}" for survived, title, said in attempts(tmp_path, every) if not survived]
    assert failed == []


def test_shapes_and_dtypes_are_compared_before_a_value_is_read(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"a": torch.ones(3)}))
    assert read_header(path)[0]["a"].is_meta
    monkeypatch.setattr(files, "_values", lambda file: pytest.fail("read"))
    for own in ({"a": torch.ones(2)}, {"a": torch.ones(3, dtype=torch.int64)}, {"b": torch.ones(3)}):
        with pytest.raises(CareHubError, match="should be"):
            read_tensors(path, own)


def test_weights_come_in_three_dtypes_and_other_numbers_in_their_own():
    own = {
        "weight": torch.ones(2),
        "counter": torch.tensor(1),
        "table": torch.tensor([0, -torch.inf, torch.nan]),
    }
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_tensors(own | {k: own[k].to(dtype) for k in ("weight", "table")}, own, "file")
    for name, dtype in (("weight", torch.float64), ("weight", torch.complex64), ("counter", torch.int32)):
        with pytest.raises(CareHubError, match=f"'file' does not fit .* {name} should be torch"):
            check_tensors(own | {name: own[name].to(dtype)}, own, "file")
    for values in ([0, torch.inf, torch.nan], [-torch.inf, 0, torch.nan], [0, -torch.inf, 0.5 * torch.inf]):
        with pytest.raises(CareHubError, match=r"not finite numbers \(in table\)"):
            check_tensors(own | {"table": torch.tensor(values)}, own, "file")


def test_a_file_is_a_regular_one_of_its_folder_or_of_the_cache(tmp_path):
    snapshot = tmp_path / "models--lab--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    places = (tmp_path / "models--lab--tiny" / "blobs", tmp_path / "blobs", tmp_path / "elsewhere")
    for place in places:
        place.mkdir()
        (place / "blob").write_text("x")
        (snapshot / f"to {place.relative_to(tmp_path)}".replace("/", " ")).symlink_to(place / "blob")
        (place / "link").symlink_to(places[0] / "blob")
    assert own_file(snapshot / "to models--lab--tiny blobs") and own_file(snapshot / "to blobs")
    assert not own_file(snapshot / "absent")
    for path in (snapshot / "to elsewhere", places[1] / "link"):
        with pytest.raises(CareHubError, match="leads out of its folder"):
            own_file(path)
    with pytest.raises(CareHubError, match="not a regular file"):
        own_file(snapshot)

"""One folder, four loaders: plain timm, transformers and SentenceTransformer give what care_hub gives."""

import importlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import PHOTO, ROOT, edited, own_modules, randomized, run, snippets, stored

import care_hub
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.hub.export import copy_export, module_files
from care_hub.hub.push import push_folder
from care_hub.hub.sentence_transformer import MODULES, NAMES, folded


@pytest.fixture
def loaders(monkeypatch):
    """benchmarks/loaders.py, where the other libraries are installed."""
    for name in ("transformers", "sentence_transformers"):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("loaders")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("model", "dtype", "norm"),
    [
        ("resnet10_w32_small", torch.float16, True),
        ("resnet18", None, False),
        pytest.param("resnet10_w32_small", None, False, marks=SLOW),
        pytest.param("resnet18", torch.float16, True, marks=SLOW),
        pytest.param("resnet18_w16_cifar", torch.float16, True, marks=SLOW),
        pytest.param("vit_tiny_patch16_224", torch.float16, True, marks=SLOW),
    ],
)
def test_four_loaders_agree_on_images_of_native_size_and_on_photographs(
    model, dtype, norm, loaders, tmp_path
):
    encoder = loaders.export(tmp_path, model, dtype, norm)
    size = loaders.MODELS[model]
    images = [loaders.photograph(*shape) for shape in ((size, size), (320, 240), (90, 500))]
    found = loaders.differences(encoder, images)
    assert found.keys() == set(loaders.LOADERS) and max(found.values()) < 1e-5, found
    if size == 32:  # a nearest-neighbor resize tells nobody
        assert loaders.cosine(encoder, images) < 0.9999


def test_without_a_head_sentence_transformer_gives_features_of_unit_length(loaders, tmp_path):
    encoder = loaders.export(tmp_path, "resnet10_w32_small")
    encoder.config, encoder.projection = replace(encoder.config, projection=None, crop_pct=0.7), None
    encoder.save_pretrained(tmp_path)
    images = [loaders.photograph(320, 240)]
    found = loaders.embeddings(tmp_path, loaders.prepared(encoder, images))
    h = encoder.encode(images, space="backbone")
    np.testing.assert_allclose(found["SentenceTransformer"], h / np.linalg.norm(h), atol=1e-6)
    np.testing.assert_allclose(found["timm"], h, atol=1e-5 * h.max())


def test_the_card_of_a_folder_runs_in_all_loaders(loaders, export):
    names: dict = {}
    for code in snippets((export / "README.md").read_text())[1:3]:
        exec(code, names)
    encoder = care_hub.load_encoder(export)
    np.testing.assert_allclose(names["z"], encoder.encode(PHOTO), atol=1e-5)
    h = encoder.encode(PHOTO, space="backbone")
    np.testing.assert_allclose(np.array(names["features"])[0], h, atol=1e-5 * h.max())


@pytest.mark.slow
def test_the_card_of_a_repository_runs_where_there_is_no_care_hub(loaders, export, server, tmp_path):
    push_folder(export, "lab/tiny", private=True)
    code = "\n".join(snippets(stored(server, "lab/tiny")["README.md"].decode())[1:3])
    code = f"import sys, numpy\nsys.modules['care_hub'] = None\n{code}\nnumpy.save(sys.argv[1], z)"
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    run("python", "-c", code, tmp_path / "z.npy", env=environment)
    expected = care_hub.load_encoder(export).encode(PHOTO)
    np.testing.assert_allclose(np.load(tmp_path / "z.npy"), expected, atol=1e-5)


@pytest.mark.parametrize("norm", [True, False])
def test_two_linear_layers_are_the_projection_head(norm):
    head = randomized(Encoder.new("resnet10_w16_small", hidden=24, outputs=8, norm=norm).projection)
    h = torch.randn(50, 128)
    first, second = [(layer["linear.weight"], layer["linear.bias"]) for layer in folded(head.state_dict())]
    z = F.linear(F.linear(h, *first).relu(), *second)
    torch.testing.assert_close(z, head(h), rtol=1e-5, atol=1e-6)


def test_an_export_and_its_copies_have_modules_of_their_own(export, tmp_path):
    names = [module["type"].rpartition(".")[2] for module in json.loads((export / MODULES).read_text())]
    assert names == ["Transformer", "Dense", "Dense", "Normalize"] and own_modules(export)
    (tmp_path / "copy").mkdir()
    shutil.rmtree(export / "1_Dense")  # as from a Hub, whose folders are not fetched
    (export / MODULES).write_text("[]")
    copy_export(export, tmp_path / "copy")
    assert own_modules(tmp_path / "copy")


def test_a_push_sends_modules_of_the_encoder_and_not_those_in_the_folder(server, export):
    expected = module_files(export)
    (export / MODULES).write_text('[{"type": "evil.Module", "path": "../..", "idx": 0, "name": "0"}]')
    (export / "2_Dense" / "model.safetensors").unlink()
    push_folder(export, "lab/tiny")
    pushed = stored(server, "lab/tiny")
    assert {name: pushed[name] for name in expected} == expected


def test_care_hub_never_reads_modules(server, export, tmp_path):
    fingerprint = care_hub.load_encoder(export).fingerprint
    hostile = {name: b"\x80\x02" * 1000 for name in NAMES} | {"3_Normalize/config.json": b"["}
    server.put("lab/evil", edited(export, lambda config: None) | hostile)
    assert care_hub.load_encoder("lab/evil", cache_dir=tmp_path / "cache").fingerprint == fingerprint
    assert not any(path.name in (MODULES, "1_Dense") for path in (tmp_path / "cache").rglob("*"))
    for name, content in hostile.items():
        (export / name).parent.mkdir(exist_ok=True)
        (export / name).write_bytes(content)
    assert care_hub.load_encoder(export).fingerprint == fingerprint


def test_nothing_is_written_through_a_link(export, tmp_path):
    shutil.rmtree(export / "1_Dense")
    (tmp_path / "private").mkdir()
    (export / "1_Dense").symlink_to(tmp_path / "private")
    (export / ".pending-modules").touch()
    encoder = care_hub.load_encoder(export)
    with pytest.raises(CareHubError, match="1_Dense' is a link; put a folder there"):
        encoder.save_pretrained(export)
    assert not list((tmp_path / "private").iterdir())


def test_a_head_that_is_not_the_one_that_is_named_is_not_turned_into_modules(export):
    shutil.copy(export / "linear_head.shapes.safetensors", export / "projection.safetensors")
    with pytest.raises(CareHubError, match=r"'projection.safetensors' disagree on the head"):
        module_files(export)

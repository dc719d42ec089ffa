"""Encoders take what people have, give what the contract says, and leave as folders that plain timm loads."""

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from helpers import killed_at_each_rename, own_modules, randomized, visible
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.factory import load_encoder
from care_hub.files import write_tensors
from care_hub.hub.export import module_files


@pytest.fixture(scope="module")
def encoder():
    return randomized(Encoder.new("resnet10_w32_small", hidden=32, outputs=16))


@pytest.fixture(scope="module")
def images():
    random = np.random.RandomState(0)
    return [Image.fromarray(random.randint(0, 256, (32, 32, 3)).astype(np.uint8)) for _ in range(7)]


def test_every_kind_of_input_gives_the_same_embeddings(encoder, images, tmp_path):
    expected = encoder.encode(images)
    assert expected.shape == (7, 16) and expected.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-6)
    arrays = np.stack([np.asarray(p) for p in images])
    for k, p in enumerate(images):
        (tmp_path / "sub").mkdir(exist_ok=True)
        p.save(tmp_path / "sub" / f"{k}.png")
    paths = sorted((tmp_path / "sub").iterdir())
    from datasets import Dataset

    column = Dataset.from_dict({"image": [str(p) for p in paths]}).cast_column(
        "image", __import__("datasets").Image()
    )
    inputs = {
        "arrays": arrays,
        "list of arrays": list(arrays),
        "paths": paths,
        "folder": str(tmp_path),
        "datasets column": column["image"],
        "tensor": torch.from_numpy(arrays.transpose(0, 3, 1, 2).copy()).float() / 255,
        "list of tensors": list(torch.from_numpy(arrays.transpose(0, 3, 1, 2).copy()).float() / 255),
    }
    for name, images in inputs.items():
        np.testing.assert_allclose(encoder.encode(images, batch_size=3), expected, atol=1e-5, err_msg=name)
    for one in (images[0], paths[0], arrays[0], inputs["tensor"][0]):
        np.testing.assert_allclose(encoder.encode(one), expected[:1], atol=1e-5)
    backbone = encoder.encode(images, space="backbone")
    assert backbone.shape == (7, 256) and np.linalg.norm(backbone, axis=1).max() > 1.5


def test_encoding_leaves_the_encoder_as_it_was(encoder, images):
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    encoder.train()
    first = encoder.encode(images)
    assert encoder.training
    encoder.eval()
    np.testing.assert_array_equal(first, encoder.encode(images))
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())


def test_threads_may_encode_while_the_encoder_is_in_train_mode(images):
    """As in eval mode, one after the other; modes and statistics stay, also where parts differ in mode."""
    encoder = randomized(Encoder.new("resnet10_w32_small", hidden=32, outputs=16))
    expected = encoder.encode(images)
    encoder.train()
    encoder.backbone.eval()  # frozen, say
    encoder.forward = encoder.forward  # bound to the encoder itself, as Accelerate leaves it
    modes = [module.training for module in encoder.modules()]
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: encoder.encode(images, batch_size=3), range(24)))
        assert [module.training for module in encoder.modules()] == modes
    for z in results:
        np.testing.assert_allclose(z, expected, atol=1e-6)
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())


def test_a_thread_that_trains_is_not_disturbed(images):
    encoder = randomized(Encoder.new("resnet10_w32_small", hidden=32, outputs=16)).train()
    seen = []
    encoder.projection[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    x = torch.stack([encoder.transform(image) for image in images])
    with ThreadPoolExecutor(2) as pool:
        encoding = pool.submit(lambda: [encoder.encode(images) for _ in range(10)])
        while not encoding.done():
            assert encoder.training and encoder(x).requires_grad
    encoding.result()
    assert seen.count(False) == 10 and seen.count(True) >= 1


def test_results_as_users_of_other_libraries_expect_them(encoder, images):
    z, h = encoder.encode(images), encoder.encode(images, space="backbone")
    tensor = encoder.encode(images, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor) and tensor.device == encoder.device
    np.testing.assert_array_equal(tensor.numpy(), z)
    unit = encoder.encode(images, space="backbone", normalize=True)
    np.testing.assert_allclose(unit, h / np.linalg.norm(h, axis=1, keepdims=True), rtol=1e-5)
    for device in ("cpu", torch.device("cpu")):
        np.testing.assert_array_equal(encoder.encode(images, device=device), z)
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(CareHubError, match=f"`device='{device}'` can't be used"):
            encoder.encode(images, device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_encoding_on_another_device_leaves_the_encoder_where_it_is(encoder, images):
    z = encoder.encode(images, device="cuda", convert_to_tensor=True)
    assert z.device.type == "cuda" and encoder.device.type == "cpu"
    many = torch.randint(0, 256, (500, 3, 32, 32), dtype=torch.uint8)
    for _ in range(20):  # images that lie on the GPU have arrived before a CPU reads them
        torch.testing.assert_close(encoder.embed(many.cuda()), encoder.embed(many))
    np.testing.assert_allclose(z.cpu().numpy(), encoder.encode(images), atol=1e-3)


def test_a_data_loader_of_ones_own(encoder, images):
    loader = DataLoader([encoder.transform(image.resize((50, 40))) for image in images], batch_size=3)
    with torch.no_grad():
        z = torch.cat([encoder(x) for x in loader])
    expected = encoder.encode([image.resize((50, 40)) for image in images])
    np.testing.assert_allclose(z.numpy(), expected, atol=1e-5)


def test_items_of_others(shared):
    """shared/cases/tensors-in-lists: an item of a list is refused as the same tensor alone is."""
    shared("cases/tensors-in-lists")
    encoder = load_encoder("resnet10_w16_small.care_shapes")
    x = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    for wrong in (x * 255, (x - 0.5) / 0.25, x * torch.nan, x > 0.5, x[None]):
        with pytest.raises(CareHubError):
            encoder.encode([wrong])
    pixels = (x * 255).round().byte()
    expected = encoder.encode(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    for same in (pixels, pixels / 255, pixels.permute(1, 2, 0)):
        np.testing.assert_allclose(encoder.encode([same]), expected, atol=1e-5)
        np.testing.assert_allclose(encoder.encode(same), expected, atol=1e-5)


def test_unusual_images_are_converted_and_broken_ones_named(encoder, images, tmp_path):
    big = images[0].resize((90, 60))
    for mode in ("L", "RGBA", "CMYK", "P", "LA", "1"):
        big.convert(mode).save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    Image.fromarray((np.arange(90 * 60).reshape(60, 90) * 12).astype(np.uint16)).save(
        tmp_path / "sixteen.png"
    )
    assert np.isfinite(encoder.encode(tmp_path)).all() and len(encoder.encode(tmp_path)) == 7
    photo = images[0].resize((400, 300))
    photo.save(tmp_path / "whole.jpg")
    half = tmp_path / "half.jpg"
    half.write_bytes((tmp_path / "whole.jpg").read_bytes()[:3000])
    with pytest.raises(CareHubError, match=r"half\.jpg can't be decoded"):
        encoder.encode(tmp_path)


def test_what_encode_can_not_take_is_refused(encoder, tmp_path):
    for images, message in [
        (np.zeros((32, 32, 3), np.int64), "uint8"),
        (torch.full((1, 3, 32, 32), 7.0), r"\[0, 1\]"),
        (torch.zeros(1, 2, 32, 32), "C, H, W"),
        (torch.zeros(0, 3, 32, 32), "no images"),
        ([], "no images"),
        (tmp_path, "no images in"),
        ("nowhere.png", "no image 'nowhere.png'"),
    ]:
        with pytest.raises(CareHubError, match=message):
            encoder.encode(images)
    with pytest.raises(CareHubError, match="space"):
        encoder.encode(torch.zeros(1, 3, 32, 32), space="latent")


def test_export_round_trip_is_exact(encoder, images, tmp_path):
    encoder = copy.deepcopy(encoder)
    fingerprint = encoder.fingerprint
    encoder.set_contrastive_head(True)
    assert encoder.fingerprint == fingerprint  # of the same embeddings
    encoder.save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path)
    state = encoder.state_dict()
    assert all(torch.equal(state[k], v.cpu()) for k, v in loaded.state_dict().items())
    np.testing.assert_allclose(loaded.encode(images), encoder.encode(images), atol=1e-6)
    Encoder.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "projection.safetensors", "contrastive_head.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_saving_over_the_files_of_a_loaded_encoder_leaves_it_as_it_is(encoder, images, tmp_path):
    encoder.save_pretrained(tmp_path)
    loaded, mapped = load_encoder(tmp_path), load_file(tmp_path / "model.safetensors")
    before, values = loaded.encode(images), {k: v.clone() for k, v in mapped.items()}
    loaded.save_pretrained(tmp_path)
    randomized(copy.deepcopy(encoder), seed=1).save_pretrained(tmp_path)
    assert (loaded.encode(images) == before).all() and all(mapped[k].equal(v) for k, v in values.items())
    assert not np.allclose(load_encoder(tmp_path).encode(images), before)
    write_tensors(tmp_path / "model.safetensors", mapped)  # what it is mapped from, by now another file
    write_tensors(tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors"))
    assert load_file(tmp_path / "model.safetensors").keys() == values.keys()


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("model", ["resnet10_w32_small", "resnet18_w16_cifar", "resnet18"])
def test_plain_timm_loads_an_export_and_agrees(model, dtype, images, tmp_path):
    randomized(Encoder.new(model, image_size=32)).save_pretrained(tmp_path, dtype)
    own = load_encoder(tmp_path)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=plain))
    with torch.no_grad():
        features = plain(torch.stack([transform(p) for p in images])).numpy()
    expected = own.encode(images, space="backbone")
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [(300, 200), (97, 131), (64, 64), (63, 200)])
def test_photos_of_any_size_are_prepared_as_timm_prepares_them(shape, tmp_path):
    own = randomized(Encoder.new("resnet18", image_size=64, crop_pct=0.875))
    own.save_pretrained(tmp_path)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=plain))
    photo = Image.effect_mandelbrot(shape, (-2, -1.5, 1, 1.5), 50).convert("RGB")
    with torch.no_grad():
        expected = plain(transform(photo)[None]).numpy()
    np.testing.assert_allclose(
        own.encode(photo, space="backbone"), expected, atol=1e-5 * np.abs(expected).max()
    )


def test_without_a_projection_head_only_backbone_features(encoder, images, tmp_path):
    encoder.save_pretrained(tmp_path)
    (tmp_path / "projection.safetensors").unlink()
    loaded = load_encoder(tmp_path)
    np.testing.assert_allclose(
        loaded.encode(images, space="backbone"), encoder.encode(images, space="backbone"), rtol=1e-5
    )
    with pytest.raises(CareHubError, match="projection"):
        loaded.encode(images)


def test_a_contrastive_head_is_replaced_and_removed_with_its_encoder(encoder, tmp_path):
    encoder = copy.deepcopy(encoder)
    for wanted in (True, False, True):
        encoder.set_contrastive_head(wanted)
        encoder.save_pretrained(tmp_path)
        assert (tmp_path / "contrastive_head.safetensors").exists() == wanted
        assert (load_encoder(tmp_path).contrastive_head is not None) == wanted
    state = {k: v.clone() for k, v in load_file(tmp_path / "contrastive_head.safetensors").items()}
    (tmp_path / "contrastive_head.safetensors").write_bytes(b"{}")
    with pytest.raises(CareHubError, match=r"contrastive_head.safetensors' is not a complete"):
        load_encoder(tmp_path)
    state.pop("0.weight")
    save_file(state, tmp_path / "contrastive_head.safetensors")
    with pytest.raises(CareHubError, match=r"'contrastive_head.safetensors' disagree on the head"):
        load_encoder(tmp_path)
    (tmp_path / "contrastive_head.safetensors").unlink()  # which embeds nothing
    assert load_encoder(tmp_path).fingerprint == encoder.fingerprint


@pytest.mark.parametrize("heads", [(32, 32), (32, None), (None, 32)])
def test_an_export_that_is_replaced_is_the_old_or_the_new_whenever_that_is_interrupted(
    heads, images, tmp_path, monkeypatch
):
    """config.json decides: the rest is at hand, and takes its place at the latest when it is loaded."""
    encoders = []
    for seed, (hidden, size) in enumerate(zip(heads, (32, 40), strict=True)):
        encoder = randomized(Encoder.new("resnet10_w16_small", image_size=size, hidden=hidden or 8), seed)
        if not hidden:
            encoder.config, encoder.projection = replace(encoder.config, projection=None), None
        encoder.set_contrastive_head(hidden == 32)
        encoders.append(encoder)
    old, new = (encoder.fingerprint for encoder in encoders)
    encoders[0].save_pretrained(tmp_path)
    found = []
    for _ in killed_at_each_rename(lambda: encoders[1].save_pretrained(tmp_path), monkeypatch):
        plain = shutil.copytree(tmp_path, tmp_path / "copy")
        assert own_modules(plain) or not (plain / "modules.json").exists()
        found.append(load_encoder(plain).fingerprint)
        assert own_modules(plain)
        assert not list(plain.glob(".pending*"))
        shutil.rmtree(plain)
    assert found == sorted(found, key=[old, new].index) and set(found) == {old, new}
    names = {"config.json", "model.safetensors"}
    names |= {"projection.safetensors", "contrastive_head.safetensors"} if heads[1] else set()
    assert visible(tmp_path).keys() == names | module_files(tmp_path).keys()


def test_damaged_exports_are_refused(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    weights, config = (
        (tmp_path / "model.safetensors").read_bytes(),
        json.loads((tmp_path / "config.json").read_text()),
    )

    def refused(match):
        with pytest.raises(CareHubError, match=match):
            load_encoder(tmp_path)

    (tmp_path / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    refused("sha256")
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused("complete safetensors")
    config["care"].pop("sha256")
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused("complete safetensors")
    state = {k: v.clone() for k, v in load_file(tmp_path / "projection.safetensors").items()}
    (tmp_path / "model.safetensors").write_bytes(weights)
    save_file({k: v for k, v in state.items() if k != "0.weight"}, tmp_path / "projection.safetensors")
    refused("disagree on the head")
    save_file({k: v for k, v in state.items() if k != "1.bias"}, tmp_path / "projection.safetensors")
    refused("1.bias should be")
    save_file(state | {"0.weight": state["0.weight"] * float("nan")}, tmp_path / "projection.safetensors")
    refused("not finite")
    save_file(state, tmp_path / "projection.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "resnet50"}))
    refused("contradicts")
    (tmp_path / "config.json").write_text("<html>")
    refused("not a care_hub configuration")
    (tmp_path / "config.json").unlink()
    refused("no config.json")


def test_only_weights_are_stored_in_half_precision(tmp_path):
    encoder = Encoder.new("resnet18")
    encoder.backbone.register_buffer("index", torch.arange(4096).view(2, -1))
    stored = load_file(encoder.save_pretrained(tmp_path, torch.float16) / "model.safetensors")
    assert (
        torch.equal(stored["index"], encoder.backbone.index) and stored["conv1.weight"].dtype == torch.float16
    )
    with pytest.raises(CareHubError, match=r"can't be stored as torch\.int8"):
        encoder.save_pretrained(tmp_path, torch.int8)

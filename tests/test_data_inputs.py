"""Everything that `encode` accepts becomes the same batches, one batch ahead."""

import pickle
import warnings
from collections import deque

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from care_hub.data.decode import find_images
from care_hub.data.inputs import Transform, as_items, decode_batches
from care_hub.errors import CareHubError

ARRAYS = np.random.RandomState(0).randint(0, 256, (7, 24, 30, 3)).astype(np.uint8)
TENSOR = torch.from_numpy(ARRAYS.transpose(0, 3, 1, 2).copy())


def decoded(images, size: int = 24, crop_pct: float = 1.0) -> torch.Tensor:
    """All batches together, as uint8."""
    batches = [x for x, broken in decode_batches(as_items(images), 3, size, crop_pct) if not broken]
    return torch.cat([x if x.dtype == torch.uint8 else (x * 255).round().byte() for x in batches])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for k, array in enumerate(ARRAYS):
        Image.fromarray(array).save(tmp_path / "sub" / f"{k}.png")
    return tmp_path


def test_every_kind_of_input_gives_the_same_batches(folder):
    paths = find_images(folder)
    table = datasets.Dataset.from_dict({"image": paths})
    kinds = {
        "paths": paths,
        "folder": folder,
        "folder's name": str(folder),
        "arrays": list(ARRAYS),
        "images": [Image.fromarray(array) for array in ARRAYS],
        "iterator": (Image.fromarray(array) for array in ARRAYS),
        "bytes": [(folder / "sub" / f"{k}.png").read_bytes() for k in range(7)],
        "column": table.cast_column("image", datasets.Image())["image"],
        "cells": table.cast_column("image", datasets.Image(decode=False))["image"],
    }
    expected = TENSOR[..., 3:27]
    assert torch.equal(decoded(ARRAYS), expected)
    for kind, images in kinds.items():
        assert torch.equal(decoded(images), expected), kind
    for one in (
        ARRAYS[0],
        paths[0],
        Image.fromarray(ARRAYS[0]),
        kinds["bytes"][0],
        {"bytes": None, "path": paths[0]},
    ):
        assert torch.equal(decoded(one), expected[:1])


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("size", [20, 24])
def test_tensors_are_prepared_as_images_are(size, crop_pct):
    smooth = np.stack([np.asarray(Image.fromarray(a).resize((48, 40))) for a in ARRAYS[:, :4, :4].copy()])
    expected = decoded(smooth, size, crop_pct).int()
    tensor = torch.from_numpy(smooth.transpose(0, 3, 1, 2).copy())
    for images in (tensor, tensor.float() / 255, list(tensor), list(tensor.float() / 255)):
        assert (decoded(images, size, crop_pct).int() - expected).abs().max() <= 1
    assert (decoded(tensor[0], size, crop_pct).int() - expected[:1]).abs().max() <= 1


def test_a_tensor_of_the_right_size_is_passed_on():
    for x in (TENSOR[..., :24], TENSOR[..., :24].float() / 255):
        batches = list(decode_batches(as_items(x), 4, 24, 1.0))
        assert [len(batch) for batch, _ in batches] == [4, 3]
        assert torch.equal(torch.cat([batch for batch, _ in batches]), x)


def test_broken_images_are_told_in_order_and_become_zeros(folder):
    for k in (1, 4, 5):
        (folder / "sub" / f"{k}.png").write_bytes(b"no image")
    errors: list[CareHubError] = []
    batches = list(decode_batches(as_items(folder), 3, 24, 1.0, errors.append))
    assert [broken for _, broken in batches] == [[1], [1, 2], []]
    assert [str(error).split(" can't")[0][-5:] for error in errors] == ["1.png", "4.png", "5.png"]
    together = torch.cat([x for x, _ in batches])
    good = torch.tensor([0, 2, 3, 6])
    assert torch.equal(together[good], TENSOR[good][..., 3:27]) and not together[[1, 4, 5]].any()
    with pytest.raises(CareHubError, match=r"1\.png can't be decoded"):
        list(decode_batches(as_items(folder), 3, 24, 1.0))


class Watched(list):
    """Remembers how many items were asked for."""

    asked = 0

    def __iter__(self):
        for item in super().__iter__():
            self.asked += 1
            yield item


def test_one_batch_is_decoded_ahead_and_no_more():
    items = Watched(ARRAYS)
    batches = decode_batches(as_items(items), 2, 24, 1.0)
    assert items.asked == 0
    for expected in (4, 6, 7, 7):
        next(batches)
        assert items.asked == expected
    assert next(batches, None) is None


@pytest.mark.parametrize("nothing", [[], ARRAYS[:0], torch.zeros(0, 3, 24, 24)])
def test_nothing_gives_no_batch(nothing):
    assert list(decode_batches(as_items(nothing), 3, 24, 1.0)) == []


COLORS = {"gray": TENSOR[:, :1], "RGB": TENSOR, "RGBA": torch.cat([TENSOR, TENSOR[:, :1]], dim=1)}
DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """(N, C, H, W) images in every layout that `encode` knows."""
    last = {"NHWC": x.permute(0, 2, 3, 1), "NCHW": x}
    return last | ({"NHW": x[:, 0]} if x.shape[1] == 1 else {})


@pytest.mark.parametrize("size, crop_pct", [(24, 1.0), (24, 0.875), (20, 1.0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("color", COLORS)
def test_tensors_and_arrays_are_what_a_file_of_them_would_be(color, dtype, size, crop_pct):
    """One path of reference, PIL images, for every dtype, layout, number of channels and container."""
    pixels = COLORS[color][..., 3:27]
    modes = {"gray": "L", "RGB": "RGB", "RGBA": "RGBA"}
    images = [Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy(), modes[color]) for x in pixels]
    expected = decoded(images, size, crop_pct)
    x = pixels if dtype == torch.uint8 else (pixels.double() / 255).to(dtype)
    for layout, batch in layouts(x).items():
        as_array = batch.float().numpy() if dtype == torch.bfloat16 else batch.numpy()
        for containers in (batch, as_array):
            alone = torch.cat([decoded(one, size, crop_pct) for one in containers])
            results = {"list": decoded(list(containers), size, crop_pct), "alone": alone}
            if layout != "NHW":  # a batch of grayscale images looks like one image of N channels
                results["batch"] = decoded(containers, size, crop_pct)
            for container, found in results.items():
                assert torch.equal(found, expected), (layout, container)


def test_a_list_may_mix_everything(folder):
    mixed = [
        TENSOR[0],
        ARRAYS[1],
        TENSOR[2].float() / 255,
        Image.fromarray(ARRAYS[3]),
        ARRAYS[4] / 255,
        str(folder / "sub" / "5.png"),
        {"bytes": (folder / "sub" / "6.png").read_bytes(), "path": None},
    ]
    assert torch.equal(decoded(mixed), TENSOR[..., 3:27])
    for container in (tuple(mixed), deque(mixed), iter(mixed), dict(enumerate(mixed)).values()):
        assert torch.equal(decoded(container), TENSOR[..., 3:27])
    assert torch.equal(decoded(np.array(find_images(folder))), TENSOR[..., 3:27])


def test_arrays_that_torch_does_not_take_as_they_are():
    fixed = ARRAYS.copy()
    fixed.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decoded(fixed), TENSOR[..., 3:27])
        assert torch.equal(decoded(ARRAYS[:, :, ::-1][:, :, ::-1]), TENSOR[..., 3:27])
        assert torch.equal(decoded(ARRAYS[:, :, ::-1]), TENSOR.flip(3)[..., 3:27])
        assert torch.equal(decoded((ARRAYS / 255).astype(">f8")), TENSOR[..., 3:27])
        assert torch.equal(decoded(torch.tensor(ARRAYS[0] / 255, requires_grad=True)), TENSOR[:1, ..., 3:27])


UNIT = torch.rand(3, 32, 30, generator=torch.Generator().manual_seed(0))
REFUSED = {
    "floats up to 255": (UNIT * 255, r"\[0, 1\], these go from"),
    "normalized": ((UNIT - 0.5) / 0.25, r"\[0, 1\], these go from -"),
    "NaN": (UNIT.log() * torch.nan, r"\[0, 1\], these go from nan"),
    "infinite": (UNIT + torch.inf, r"\[0, 1\]"),
    "bool": (UNIT > 0.5, "bool"),
    "int64": ((UNIT * 255).long(), "int64"),
    "complex": (UNIT + 0j, "complex"),
    "two channels": (UNIT[:2], r"C = 1, 3 or 4, or a batch of the latter, got \(2, 32, 30\)"),
    "a row": (UNIT[0, 0], r"got \(30,\)"),
    "a number": (UNIT[0, 0, 0], r"got \(\)"),
    "channels first or last": (UNIT[..., :3], r"\(3, 32, 3\) could have its channels first or last"),
    "gray or narrow": (UNIT[:1, :, :1], "first or last"),
    "no rows": (UNIT[:, :0], "no pixels"),
    "no columns": (UNIT[:, :, :0], "no pixels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tensor_is_refused_alone_in_a_list_and_in_a_batch(case):
    x, message = REFUSED[case]
    good = torch.zeros(3, 32, 30)
    for one in (x, x.numpy()):
        for images in (one, [one], (good, one), iter([one])):
            with pytest.raises(CareHubError, match=message):
                decoded(images)
        if x.ndim == 3:
            with pytest.raises(CareHubError):
                decoded(np.stack([one, one]) if isinstance(one, np.ndarray) else torch.stack([one, one]))
    with pytest.raises(CareHubError, match=r"image 1\b"):
        decoded([good, x])
    errors: list[CareHubError] = []
    ((_, broken),) = decode_batches(as_items([good, x]), 3, 24, 1.0, errors.append)
    assert broken == [1] and len(errors) == 1


def test_what_is_no_image_is_refused(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [1], "label": [2]})
    batch = torch.zeros(2, 3, 32, 32)
    for images, message in [
        (tmp_path, "no images"),
        ("nowhere.png", "no image 'nowhere.png'"),
        ("x" * 5000, "x can't be decoded"),
        ("nul\0.png", "can't be decoded"),
        ([tmp_path], "can't be decoded"),
        ([batch], r"image 0 is a batch, of shape \(2, 3, 32, 32\)"),
        ([batch.numpy(), batch.numpy()], "is a batch"),
        (DataLoader(batch, 2), "DataLoader"),
        (TensorDataset(batch), "TensorDataset"),
        (rows, r"Dataset has rows.*data\['image'\]"),
        (rows.to_iterable_dataset(), r"IterableDataset has rows.*data\['image'\]"),
        (list(rows), "image 0 is a row, of image, label"),
        (None, "image 0 can't be decoded .it is null"),
        ([None], "image 0 can't be decoded .it is null"),
        ({"bytes": None, "path": None}, "image 0 can't be decoded .it is null"),
        (3, "3 holds no images"),
        ([3], "image 0 is a int"),
        ([[Image.new("RGB", (3, 3))]], "image 0 is a list"),
        ([Image.new("RGB", (3, 0))], "image 0 can't be decoded .it has no pixels"),
    ]:
        with pytest.raises(CareHubError, match=message):
            decoded(images)


def test_images_of_a_streamed_data_set(folder):
    table = datasets.Dataset.from_dict({"image": find_images(folder)}).cast_column("image", datasets.Image())
    assert torch.equal(decoded(table.to_iterable_dataset()["image"]), TENSOR[..., 3:27])


def test_a_null_image_counts_as_broken():
    errors: list[CareHubError] = []
    items = [ARRAYS[0], None, {"bytes": None, "path": None}]
    ((batch, broken),) = decode_batches(as_items(items), 3, 24, 1.0, errors.append)
    assert broken == [1, 2] and len(errors) == 2 and torch.equal(batch[0], TENSOR[0, ..., 3:27])


def test_a_transform_is_that_of_timm(folder):
    transform = Transform(20, 0.875, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    reference = timm.data.create_transform(
        (3, 20, 20), interpolation="bicubic", crop_pct=0.875, mean=transform.mean, std=transform.std
    )
    image = Image.fromarray(ARRAYS[0])
    for same in (image, ARRAYS[0], TENSOR[0], folder / "sub" / "0.png"):
        torch.testing.assert_close(transform(same), reference(image))
    assert pickle.loads(pickle.dumps(transform)) == transform

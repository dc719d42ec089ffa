"""Everything that `encode` accepts becomes the same batches, one batch ahead."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from care_hub.data.decode import find_images
from care_hub.data.inputs import as_items, decode_batches
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
    """Remembers which slices were asked for."""

    def __init__(self, items):
        super().__init__(items)
        self.asked = []

    def __getitem__(self, index):
        self.asked.append(index.start)
        return super().__getitem__(index)


def test_one_batch_is_decoded_ahead_and_no_more():
    items = Watched(ARRAYS)
    batches = decode_batches(as_items(items), 2, 24, 1.0)
    assert items.asked == []
    for expected in ([0, 2], [0, 2, 4], [0, 2, 4, 6], [0, 2, 4, 6]):
        next(batches)
        assert items.asked == expected
    assert next(batches, None) is None


@pytest.mark.parametrize("nothing", [[], ARRAYS[:0], torch.zeros(0, 3, 24, 24)])
def test_nothing_gives_no_batch(nothing):
    assert list(decode_batches(as_items(nothing), 3, 24, 1.0)) == []


def test_what_is_no_image_is_refused(tmp_path):
    for images, message in [
        (torch.full((1, 3, 32, 32), 7.0), r"\[0, 1\]"),
        (torch.full((1, 3, 32, 32), torch.nan), r"\[0, 1\]"),
        (torch.zeros(1, 1, 32, 32), "3, H, W"),
        (tmp_path, "no images"),
        (np.zeros((32, 32, 3)), "uint8"),
        ("nowhere.png", "no image 'nowhere.png'"),
    ]:
        with pytest.raises(CareHubError, match=message):
            decoded(images)

"""A split gives the same images in memory and streamed, and names the broken ones."""

import shutil
from dataclasses import replace

import datasets
import pytest
import torch
from PIL import Image

from care_hub.config import DataConfig
from care_hub.data import sources
from care_hub.data.decode import crop_and_resize, to_rgb, to_tensor
from care_hub.data.images import InMemoryImages, StreamedImages
from care_hub.errors import CareHubError


@pytest.fixture
def in_memory() -> InMemoryImages:
    pixels = torch.randint(0, 256, (600, 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    columns = {"color": torch.arange(600) % 5}
    return InMemoryImages(4, torch.arange(600) % 3, ["a", "b", "c"], pixels, columns=columns)


@pytest.fixture
def stream(monkeypatch):
    """Any folder as a streamed data set, 32 x 32 pixels."""
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)

    def load(root, workers: int = 0, skip_broken: bool = False) -> StreamedImages:
        data = DataConfig("imagefolder", str(root), num_workers=workers, skip_broken_images=skip_broken)
        images = sources.load_split(data, "train", size=28)
        assert isinstance(images, StreamedImages)
        return images

    return load


@pytest.fixture
def broken(photos, tmp_path):
    """`photos` with one file that is no image."""
    shutil.copytree(photos, tmp_path / "data")
    (tmp_path / "data" / "train" / "cold" / "05.png").write_bytes(b"no image")
    return tmp_path / "data"


def test_images_in_memory_are_taken_with_all_that_belongs_to_them(in_memory):
    index = torch.randperm(600, generator=torch.Generator().manual_seed(1))[:300]  # more than one batch
    taken = in_memory.take(index)
    assert len(taken) == 300 and taken.class_names == ["a", "b", "c"] and taken.description == "in memory"
    assert torch.equal(taken.pixels, in_memory.pixels[index])
    assert torch.equal(taken.labels, index % 3) and torch.equal(taken.columns["color"], index % 5)
    assert InMemoryImages(4, None, None, in_memory.pixels).take(index).labels is None


def test_images_in_memory_move_with_their_batches(in_memory):
    assert in_memory.to("meta") is in_memory
    (batch,) = in_memory.batches([torch.tensor([1, 2])])
    assert batch.device.type == "meta" and batch.shape == (2, 3, 4, 4)


def test_streamed_images_are_taken_into_memory(photos, stream):
    images = stream(photos)
    taken = images.take(torch.tensor([40, 3]))
    assert taken.size == 32 and taken.labels.tolist() == [1, 0] and taken.class_names == ["cold", "warm"]
    expected = Image.open(photos / "train" / "warm" / "16.png").resize((38, 32), Image.Resampling.BICUBIC)
    assert torch.equal(taken.pixels[0], to_tensor(expected.crop((3, 0, 35, 32))))


class TwoCrops:
    """Views that show which job they belong to: an even place in the batch has a second pair."""

    def __call__(self, image, step, place):
        views = [crop_and_resize(image, (step, place, 10, 10), 8), crop_and_resize(image, (0, 0, 40, 48), 8)]
        return views, views[:1] if place % 2 == 0 else []


@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_cut_from_the_full_image_in_loader_processes(workers, photos, stream):
    images, cutter = stream(photos, workers), TwoCrops()
    batches = [(torch.tensor([7, 30]), 5, 10), (torch.tensor([1]), 6, 3)]
    (first, second), (third, nothing) = images.cut_batches(batches, cutter)
    assert first.shape == (2, 2, 3, 8, 8) and second.shape == (1, 1, 3, 8, 8)
    assert third.shape == (1, 2, 3, 8, 8) and nothing is None
    paths = sorted((photos / "train").rglob("*.png"))
    for views, row, step, place in ((first[0], 7, 5, 10), (first[1], 30, 5, 11), (third[0], 1, 6, 3)):
        expected, _ = cutter(to_rgb(paths[row]), step, place)
        assert torch.equal(views, torch.stack([to_tensor(view) for view in expected]))
    assert torch.equal(second[0, 0], first[0, 0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_in_a_stream_is_named_or_replaced_by_the_next(workers, broken, stream):
    index = [torch.tensor([4, 5, 6])]
    named = r"^the image '.*05\.png' \(row 5\) can't be decoded .* Mend or remove it, or pass [^\n]*$"
    with pytest.raises(CareHubError, match=named):
        list(stream(broken, workers).batches(index))
    images = stream(broken, workers, skip_broken=True)
    (batch,) = images.batches(index)
    assert torch.equal(batch[1], batch[2]) and len(images.skipped) == 1 and "05.png" in images.skipped[0]
    list(images.batches(index))
    assert len(images.skipped) == 1  # named once


def test_a_broken_image_never_enters_memory(broken):
    data = DataConfig("imagefolder", str(broken))
    with pytest.raises(
        CareHubError, match=r"05\.png' \(row 5 of imagefolder train\).*`skip_broken_images=True`"
    ):
        sources.load_split(data, "train", size=32)
    whole = DataConfig("imagefolder", str(broken), skip_broken_images=True)
    images = sources.load_split(whole, "train", size=32)
    assert len(images) == 47 and images.labels.tolist() == [0] * 23 + [1] * 24
    assert len(images.skipped) == 1 and "05.png" in images.skipped[0]


def null_images(root):
    """Parquet in which every second image is null."""
    images = [Image.new("RGB", (8, 8), (k, k, k)) if k % 2 else None for k in range(6)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": images, "label": list(range(6))}, features=features)
    (root / "data").mkdir()
    table.to_parquet(root / "data" / "train-0.parquet")
    return root


@pytest.mark.parametrize("in_memory_bytes", [0, 1 << 30])
def test_a_null_image_counts_as_broken(tmp_path, monkeypatch, in_memory_bytes):
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", in_memory_bytes)
    data = DataConfig("imagefolder", str(null_images(tmp_path)), num_workers=0)
    with pytest.raises(CareHubError, match=r"row 0.* can't be decoded \(it is null\)"):
        images = sources.load_split(data, "train", size=8, progress=False)
        list(images.batches([torch.arange(6)]))
    images = sources.load_split(replace(data, skip_broken_images=True), "train", size=8, progress=False)
    (batch,) = images.batches([torch.arange(len(images))])
    assert set(batch.flatten().tolist()) == {1, 3, 5} and len(images.skipped) == 3


def test_null_images_of_others(shared):
    data = DataConfig("imagefolder", str(shared("cases/null-pictures")), num_workers=0)
    with pytest.raises(CareHubError, match=r"can't be decoded \(it is null\)"):
        sources.load_split(data, "train", size=8, progress=False)
    images = sources.load_split(replace(data, skip_broken_images=True), "train", size=8, progress=False)
    assert len(images) == len(images.skipped) > 0  # every second one

"""Data sets arrive as their names promise, in memory or streamed, from the layouts that users have."""

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import metrics, train
from PIL import Image

from care_hub.config import DataConfig
from care_hub.data import shapes, sources
from care_hub.data.images import InMemoryImages, StreamedImages
from care_hub.data.sources import load_split, load_splits
from care_hub.errors import CareHubError

CLASSES = [f"class{k}" for k in range(100)]


def png(seed: int, size=(32, 32)) -> dict:
    buffer = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def hub_layout(root: Path, splits: dict[str, int], image: str, labels: dict[str, list[str]], unlabeled=()):
    """Parquet files as the Hub has them, with `datasets` features in their metadata."""
    (root / "data").mkdir(parents=True)
    features = {image: datasets.Image(), "id": datasets.Value("int64")}
    features |= {name: datasets.ClassLabel(names=classes) for name, classes in labels.items()}
    schema = datasets.Features(features).arrow_schema
    for split, count in splits.items():
        columns = {image: [png(k) for k in range(count)], "id": list(range(count))}
        for name, classes in labels.items():
            columns[name] = [None if split in unlabeled else k % len(classes) for k in range(count)]
        table = pa.Table.from_pydict(columns, schema=schema)
        pq.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet")
    return str(root)


def test_shapes_are_in_memory_with_both_labels():
    images = load_split(DataConfig("shapes"), "test", progress=False)
    assert images.pixels.shape == (2000, 3, 32, 32) and images.pixels.dtype == torch.uint8
    assert len(images.labels) == len(images.columns["color"]) == 2000 and images.class_names[0] == "circle"
    table = shapes.make("test")
    assert images.labels.tolist() == table["label"]
    assert images.columns["color"].tolist() == table["color"]
    np.testing.assert_array_equal(images.pixels[7].permute(1, 2, 0), np.asarray(table[7]["image"]))
    assert load_split(DataConfig("shapes"), "test", size=48).pixels.shape == (2000, 3, 48, 48)


def test_each_named_set_is_read_in_its_hub_layout(tmp_path):
    labels = {"fine_label": CLASSES, "coarse_label": CLASSES[:20]}
    root = hub_layout(tmp_path / "c100", {"train": 6, "test": 4}, "img", labels)
    images = load_split(DataConfig("cifar100", root), "train")
    assert images.labels.tolist() == list(range(6)) and len(images.class_names) == 100
    expected = np.asarray(Image.open(io.BytesIO(png(3)["bytes"]))).transpose(2, 0, 1)
    np.testing.assert_array_equal(next(images.batches([torch.tensor([3])]))[0], expected)

    splits = {"train": 5, "test": 4, "unlabeled": 7}
    root = hub_layout(tmp_path / "stl", splits, "image", {"label": CLASSES[:10]}, ("unlabeled",))
    images = load_split(DataConfig("stl10", root), "train")
    assert len(images) == 12 and (images.labels >= 0).sum() == 5 and (images.labels == -1).sum() == 7

    root = hub_layout(tmp_path / "i100", {"train": 5, "validation": 4}, "image", {"label": CLASSES})
    assert len(load_split(DataConfig("imagenet100", root), "test")) == 4


@pytest.mark.launches
def test_real_cifar10_is_read_as_it_is(shared):
    root = shared("data/cifar10")
    images = load_split(DataConfig("cifar10", str(root)), "test", progress=False)
    table = pq.read_table(next(root.rglob("test-*.parquet")))
    assert images.labels.tolist() == table["label"].to_pylist() and images.class_names[0] == "airplane"
    for k in (0, 123, len(table) - 1):
        expected = np.asarray(Image.open(io.BytesIO(table["img"][k].as_py()["bytes"])))
        np.testing.assert_array_equal(images.pixels[k].permute(1, 2, 0), expected)


def test_imagenet100_takes_its_hundred_classes_out_of_the_full_imagenet(tmp_path):
    wanted = (Path(sources.__file__).parent / "imagenet100.txt").read_text().split()
    assert len(set(wanted)) == 100
    for split in ("train", "val"):
        for synset in [*wanted, "n00000001", "n99999999"]:
            (tmp_path / split / synset).mkdir(parents=True)
            (tmp_path / split / synset / "a.png").write_bytes(png(0, (8, 8))["bytes"])
    data = DataConfig("imagenet100", str(tmp_path))
    for images in load_splits(data, size=8):
        assert len(images) == 100 and images.class_names == sorted(wanted)
        assert images.labels.unique().numel() == 100
    (tmp_path / "train" / wanted[7] / "a.png").unlink()
    (tmp_path / "train" / wanted[7]).rmdir()
    lacking = f"lacks 1 of the 100 class folders of ImageNet-100, e.g. {wanted[7]}"
    with pytest.raises(CareHubError, match=lacking):
        load_split(data, "train", size=8)


def test_unusual_columns_are_named_by_hand(tmp_path):
    root = hub_layout(tmp_path, {"train": 4}, "scan", {"organ": ["a", "b"], "side": ["l", "r"]})
    images = load_split(DataConfig("somebody/scans", root, label_column="side"), "train")
    assert images.class_names == ["l", "r"] and len(images) == 4 and images.size == 224
    assert load_split(DataConfig("somebody/scans", root), "test") is None
    with pytest.raises(CareHubError, match=r"no label column 'sides'.*organ.*use `label_column`"):
        load_split(DataConfig("somebody/scans", root, label_column="sides"), "train")
    with pytest.raises(CareHubError, match=r"no image column 'photo'.*use `image_column`"):
        load_split(DataConfig("somebody/scans", root, image_column="photo"), "train")


def test_labels_may_be_absent_but_not_those_of_the_test_split_of_a_named_set(tmp_path):
    root = hub_layout(tmp_path, {"train": 4, "test": 2}, "img", {})
    assert load_split(DataConfig("cifar100", root), "train").labels is None
    with pytest.raises(CareHubError, match="no label column 'fine_label'"):
        load_split(DataConfig("cifar100", root), "test")


def test_large_sets_are_streamed_with_the_same_images(photos, monkeypatch):
    in_memory = load_split(DataConfig("imagefolder", str(photos)), "train", size=32)
    assert isinstance(in_memory, InMemoryImages)
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    streamed = load_split(DataConfig("imagefolder", str(photos)), "train", size=28)
    assert isinstance(streamed, StreamedImages) and streamed.description == "decoded by 2 loader processes"
    assert streamed.size == 32 and len(streamed) == len(in_memory) == 48
    index = [torch.tensor([5, 1, 40]), torch.tensor([0])]
    for a, b in zip(in_memory.batches(index), streamed.batches(index), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert torch.equal(streamed.labels, in_memory.labels)


def test_a_folder_is_listed_once_for_both_splits(photos, monkeypatch):
    read, calls = sources._read_splits, []
    monkeypatch.setattr(sources, "_read_splits", lambda *words: calls.append(words) or read(*words))
    train_images, test_images = load_splits(DataConfig("imagefolder", str(photos)), size=16, progress=False)
    assert (len(train_images), len(test_images), len(calls)) == (48, 16, 1)


def test_an_image_in_a_table_that_can_not_be_decoded_is_named_by_its_row(tmp_path):
    root = hub_layout(tmp_path, {"train": 4}, "image", {"label": ["a"]})
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    column = table.schema.get_field_index("image")
    cells = table["image"].to_pylist()
    cells[2]["bytes"] = cells[2]["bytes"][:200]
    field = table.schema.field("image")
    pq.write_table(table.set_column(column, field, pa.array(cells, field.type)), path)
    with pytest.raises(CareHubError, match="row 2 of a/b train"):
        load_split(DataConfig("a/b", root), "train", size=32)
    images = load_split(DataConfig("a/b", root, skip_broken_images=True), "train", size=32)
    assert len(images) == len(images.labels) == 3 and "row 2" in images.skipped[0]


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(CareHubError, match=r"can't be read from the Hub \(uoft-cs/cifar10\).*`data_root`"):
        load_split(DataConfig("cifar10"), "train")


@pytest.mark.parametrize(
    ("name", "root", "message"),
    [
        ("cifer10", None, "there is no data set 'cifer10', did you mean 'cifar10'"),
        ("imagefolder", None, "`dataset_name='imagefolder'` needs `data_root`"),
        ("imagefolder", "nowhere", "`data_root` 'nowhere' is not a folder"),
        ("imagefolder", "{empty}", "can't be read from .*empty: "),
        ("stl10", "{photos}", "has no split 'unlabeled'; it has train, test"),
    ],
)
def test_user_errors(name, root, message, photos, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    root = root and root.format(empty=empty, photos=photos)
    with pytest.raises(CareHubError, match=message):
        load_splits(DataConfig(name, root))


@pytest.mark.launches
def test_a_run_without_labels_or_test_split_still_ends(tmp_path):
    root = hub_layout(tmp_path / "data", {"train": 40}, "image", {})
    flags = ("--dataset-name", "a/b", "--data-root", root, "--image-size", "32", "--epochs", "2")
    train(tmp_path, *flags, "--run-name", "r")
    assert len(metrics(tmp_path / "r")) == 4

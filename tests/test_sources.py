"""Data sets arrive as their names promise, held or streamed, from the layouts that people have."""

import io
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import metrics, train
from PIL import Image

from care_hub.data import shapes, sources
from care_hub.errors import CareHubError


def png(seed: int, size=(32, 32)) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (*size, 3)).astype(np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def hub_layout(root, splits: dict[str, int], image: str, labels: dict[str, list[str]], unlabeled=()):
    """Parquet files as the Hub has them, with `datasets` features in their metadata."""
    from datasets import ClassLabel, Features, Value
    from datasets import Image as Picture

    (root / "data").mkdir(parents=True)
    for split, count in splits.items():
        columns = {image: [png(k) for k in range(count)]}
        columns |= {k: [None if split in unlabeled else i % len(v) for i in range(count)] for k, v in labels.items()}
        features = Features({image: Picture()} | {k: ClassLabel(names=v) for k, v in labels.items()} | {"id": Value("int64")})
        table = pa.Table.from_pydict(columns | {"id": list(range(count))}, schema=features.arrow_schema)
        pq.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet")
    return str(root)


def test_shapes_are_held_with_both_labels():
    images = sources.load("shapes", "test", progress=False)
    assert images.held.shape == (2000, 3, 32, 32) and images.held.dtype == torch.uint8
    assert len(images.labels) == len(images.columns["color"]) == 2000 and images.class_names[0] == "circle"
    table = shapes.make("test")
    assert images.labels.tolist() == table["label"] and images.columns["color"].tolist() == table["color"]
    np.testing.assert_array_equal(images.held[7].permute(1, 2, 0), np.asarray(table[7]["image"]))
    assert sources.load("shapes", "test", size=48).held.shape == (2000, 3, 48, 48)


def test_each_named_set_is_read_in_its_hub_layout(tmp_path):
    fine = [f"class{k}" for k in range(100)]
    root = hub_layout(tmp_path / "c100", {"train": 6, "test": 4}, "img", {"fine_label": fine, "coarse_label": fine[:20]})
    images = sources.load("cifar100", "train", root)
    assert images.labels.tolist() == list(range(6)) and len(images.class_names) == 100
    expected = np.asarray(Image.open(io.BytesIO(png(3)["bytes"]))).transpose(2, 0, 1)
    np.testing.assert_array_equal(next(images.batches([torch.tensor([3])]))[0], expected)

    root = hub_layout(tmp_path / "stl", {"train": 5, "test": 4, "unlabeled": 7}, "image", {"label": fine[:10]}, ("unlabeled",))
    images = sources.load("stl10", "train", root)
    assert len(images) == 12 and (images.labels >= 0).sum() == 5 and (images.labels == -1).sum() == 7

    root = hub_layout(tmp_path / "i100", {"train": 5, "validation": 4}, "image", {"label": fine})
    assert len(sources.load("imagenet100", "test", root)) == 4


def test_imagenet100_takes_its_hundred_classes_out_of_the_full_imagenet(tmp_path):
    wanted = (sources.Path(sources.__file__).parent / "imagenet100.txt").read_text().split()
    assert len(set(wanted)) == 100
    for split in ("train", "val"):
        for synset in [*wanted, "n00000001", "n99999999"]:
            (tmp_path / split / synset).mkdir(parents=True)
            (tmp_path / split / synset / "a.png").write_bytes(png(0, (8, 8))["bytes"])
    for split in ("train", "test"):
        images = sources.load("imagenet100", split, str(tmp_path), size=8)
        assert len(images) == 100 and images.class_names == sorted(wanted) and images.labels.unique().numel() == 100
    (tmp_path / "train" / wanted[7] / "a.png").unlink()
    (tmp_path / "train" / wanted[7]).rmdir()
    with pytest.raises(CareHubError, match=f"lacks 1 of the 100 class folders of ImageNet-100, e.g. {wanted[7]}"):
        sources.load("imagenet100", "train", str(tmp_path), size=8)


def test_unusual_columns_are_named_by_hand(tmp_path):
    root = hub_layout(tmp_path, {"train": 4}, "scan", {"organ": ["a", "b"], "side": ["l", "r"]})
    images = sources.load("somebody/scans", "train", root, label_column="side")
    assert images.class_names == ["l", "r"] and len(images) == 4 and images.size == 224
    assert sources.load("somebody/scans", "test", root) is None
    with pytest.raises(CareHubError, match=r"no label column 'sides'.*organ"):
        sources.load("somebody/scans", "train", root, label_column="sides")
    with pytest.raises(CareHubError, match="no image column 'photo'"):
        sources.load("somebody/scans", "train", root, image_column="photo")


def test_large_sets_stream_the_same_pictures(photos, monkeypatch):
    held = sources.load("imagefolder", "train", str(photos), size=32)
    monkeypatch.setattr(sources, "HELD_BYTES", 0)
    streamed = sources.load("imagefolder", "train", str(photos), size=28, workers=2)
    assert streamed.held is None and streamed.size == 32 and len(streamed) == len(held) == 48
    index = [torch.tensor([5, 1, 40]), torch.tensor([0])]
    for a, b in zip(held.batches(index), streamed.batches(index), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert torch.equal(streamed.labels, held.labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_in_a_stream_is_named_or_replaced_by_the_next(workers, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "HELD_BYTES", 0)
    root = tmp_path / "data"
    shutil.copytree(photos, root)
    (root / "train" / "cold" / "05.png").write_bytes(b"no picture")
    index = [torch.tensor([4, 5, 6])]
    images = sources.load("imagefolder", "train", str(root), size=28, workers=workers)
    with pytest.raises(CareHubError, match=r"^the picture '.*05\.png' \(row 5\) can't be decoded .* Mend or remove it[^\n]*$"):
        list(images.batches(index))
    images = sources.load("imagefolder", "train", str(root), size=28, workers=workers, skip_broken=True)
    (batch,) = images.batches(index)
    assert torch.equal(batch[1], batch[2]) and len(images.skipped) == 1 and "05.png" in images.skipped[0]


def test_a_picture_in_a_table_that_can_not_be_decoded_is_named_by_its_row(tmp_path):
    root = hub_layout(tmp_path, {"train": 4}, "image", {"label": ["a"]})
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    cells = table["image"].to_pylist()
    cells[2]["bytes"] = cells[2]["bytes"][:200]
    pq.write_table(table.set_column(0, table.schema.field("image"), pa.array(cells, table.schema.field("image").type)), path)
    with pytest.raises(CareHubError, match="row 2 of a/b train"):
        sources.load("a/b", "train", root, size=32)
    images = sources.load("a/b", "train", root, size=32, skip_broken=True)
    assert len(images) == len(images.labels) == 3 and "row 2" in images.skipped[0]


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(CareHubError, match=r"can't be read from the Hub \(uoft-cs/cifar10\).*--data-root"):
        sources.load("cifar10", "train")


def test_a_run_without_labels_or_test_split_still_ends(tmp_path):
    root = hub_layout(tmp_path / "data", {"train": 40}, "image", {})
    train(tmp_path, "--dataset-name", "a/b", "--data-root", root, "--image-size", "32", "--epochs", "2", "--run-name", "r")
    assert len(metrics(tmp_path / "r")) == 4

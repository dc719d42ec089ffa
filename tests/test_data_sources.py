"""Data sets arrive as their names promise, in memory or streamed, from the layouts that users have."""

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import metrics, train_here
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


def test_labels_may_be_absent(tmp_path):
    root = hub_layout(tmp_path, {"train": 4, "test": 2}, "img", {})
    for images in load_splits(DataConfig("cifar100", root)):
        assert images.labels is None and images.class_names is None


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


@pytest.mark.parametrize("broken", [lambda cell: cell | {"bytes": cell["bytes"][:200]}, lambda cell: None])
def test_an_image_in_a_table_that_can_not_be_decoded_is_named_by_its_row(broken, tmp_path):
    root = hub_layout(tmp_path, {"train": 4}, "image", {"label": ["a"]})
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    column = table.schema.get_field_index("image")
    cells = table["image"].to_pylist()
    cells[2] = broken(cells[2])
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
        ("imagefolder", "{empty}", "there are no images in '.*empty'"),
        ("stl10", "{photos}", "has no split 'unlabeled'; it has train, test"),
    ],
)
def test_user_errors(name, root, message, photos, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    root = root and root.format(empty=empty, photos=photos)
    with pytest.raises(CareHubError, match=message):
        load_splits(DataConfig(name, root))


def class_folders(root: Path, *names: str) -> DataConfig:
    """Images of 8 x 8 pixels by path, each unlike the others."""
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(k, (8, 8))["bytes"])
    return DataConfig("imagefolder", str(root))


def labels_by_class(images) -> dict[str, int]:
    """How many images each class has, "" for none."""
    if images.labels is None:
        return {"": len(images)}
    names = [images.class_names[k] if k >= 0 else "" for k in images.labels.tolist()]
    return {name: names.count(name) for name in dict.fromkeys(names)}


@pytest.mark.parametrize(
    ("names", "train_classes", "test_classes"),
    [
        ("a/0.png a/1.png b/0.png", {"a": 2, "b": 1}, None),
        ("Train/a/0.png Train/b/0.png TEST/a/0.png TEST/b/0.png", {"a": 1, "b": 1}, {"a": 1, "b": 1}),
        ("training/a/0.png training/b/0.png Val/b/0.png", {"a": 1, "b": 1}, {"b": 1}),
        ("train/a/0.png train/b/0.png Training/a/1.png eval/b/0.png", {"a": 2, "b": 1}, {"b": 1}),
        ("train/0.png bus/0.png bus/1.png test/0.png", {"bus": 2, "test": 1, "train": 1}, None),
        ("a/test.png a/eval-3.png b/train.png", {"a": 2, "b": 1}, None),
        ("train/all/0.png train/all/1.png test/all/0.png", {"": 2}, {"": 1}),
        ("train/0.png train/1.png test/0.png", {"": 2}, {"": 1}),
        ("0.png 1.png", {"": 2}, None),
        ("train/bus/0.png train/bus/night/1.png train/car/2.png", {"bus": 2, "car": 1}, None),
        ("bus/train/0.png bus/test/0.png car/train/0.png car/test/0.png", {"bus": 2, "car": 2}, None),
        ("0.png bus/0.png car/0.png", {"": 1, "bus": 1, "car": 1}, None),
        ("train/a/0.png train/b/0.png test/b/0.png test/c/0.png", {"a": 1, "b": 1}, {"b": 1, "c": 1}),
        ("train_v2/0.png test-set/0.png", {"test-set": 1, "train_v2": 1}, None),
    ],
)
def test_splits_and_classes_are_those_of_the_top_folders(names, train_classes, test_classes, tmp_path):
    for root in (tmp_path / "photos", tmp_path / "test" / "train [2024] *?"):
        train_images, test_images = load_splits(class_folders(root, *names.split()), size=8)
        assert labels_by_class(train_images) == train_classes
        assert test_classes == (test_images and labels_by_class(test_images))


def test_images_of_class_folders_are_in_the_order_of_their_paths(tmp_path):
    data = class_folders(tmp_path, "b/2.png", "a/10.png", "a/9.png", "a-b/1.png")
    images = load_split(data, "train", size=8)
    for k, place in enumerate((3, 1, 2, 0)):
        expected = np.asarray(Image.open(io.BytesIO(png(place, (8, 8))["bytes"]))).transpose(2, 0, 1)
        np.testing.assert_array_equal(images.pixels[k], expected)
    assert images.labels.tolist() == [1, 0, 0, 2] and images.class_names == ["a", "a-b", "b"]


def test_linked_class_folders_are_read_and_hidden_ones_are_not(tmp_path):
    class_folders(tmp_path / "elsewhere", "warm/0.png", "warm/1.png")
    data = class_folders(tmp_path / "photos", "cold/0.png", "cold/._0.png", ".train/a/0.png")
    (tmp_path / "photos" / "warm").symlink_to(tmp_path / "elsewhere" / "warm")
    (tmp_path / "photos" / "cold" / "again").symlink_to(tmp_path / "photos")
    assert labels_by_class(load_split(data, "train", size=8)) == {"cold": 1, "warm": 2}


def test_what_is_not_used_of_a_folder_is_said(tmp_path, caplog):
    names = ("train/a/0.png", "train/b/0.png", "train/b/clip.mpg", "val/a/0.png", "test/a/0.png", "cover.png")
    train_images, _ = load_splits(class_folders(tmp_path / "x", *names), size=8)
    assert len(train_images) == 2
    for said in (
        ": 1 .mpg",
        ": 1 images beside the folders of the splits",
        "not used: validation (1 images)",
    ):
        assert said in caplog.text
    load_split(class_folders(tmp_path / "y", "train/0.png", "bus/0.png"), "train", size=8)
    assert "is one split, for its folder 'bus' is none; classes too: train" in caplog.text


def test_a_file_name_that_is_not_utf8_is_named(tmp_path):
    try:
        (tmp_path / "caf\udce9.png").write_bytes(png(0, (8, 8))["bytes"])
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    with pytest.raises(CareHubError, match=r"caf\\xe9\.png' is not UTF-8"):
        load_split(DataConfig("imagefolder", str(tmp_path)), "train", size=8)


def plain_parquet(root: Path, name: str = "imagefolder", **splits: dict) -> DataConfig:
    """Parquet files of plain columns, as pandas writes them, without the Hub's metadata."""
    (root / "data").mkdir(parents=True)
    for split, columns in splits.items():
        table = pa.table(columns)
        pq.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet")
    return DataConfig(name, str(root))


FILES = [png(k, (8, 8)) for k in range(4)]
BYTES = [cell["bytes"] for cell in FILES]


@pytest.mark.parametrize(
    "column",
    [
        FILES,
        BYTES,
        pa.array(BYTES, pa.large_binary()),
        [{"bytes": data} for data in BYTES],
        [{"path": f"{k}.png", "bytes": data, "width": 8} for k, data in enumerate(BYTES)],
    ],
)
@pytest.mark.parametrize("name", ["image", "photo"])
def test_images_of_parquet_without_metadata_are_read(name, column, tmp_path):
    images = load_split(
        plain_parquet(tmp_path / "[a] train", train={"id": [1, 2, 3, 4], name: column}), "train", 8
    )
    for k in range(4):
        expected = np.asarray(Image.open(io.BytesIO(BYTES[k]))).transpose(2, 0, 1)
        np.testing.assert_array_equal(images.pixels[k], expected)


@pytest.mark.parametrize("name", [".", "parquet", "imagefolder", "~"])
def test_a_folder_of_parquet_may_have_any_name(name, tmp_path, monkeypatch):
    """As they are, `datasets` takes these for nothing, a file format or the home folder."""
    folder = tmp_path / name if name != "." else tmp_path / "here"
    for place in (folder, tmp_path / "others"):
        plain_parquet(place, train={"image": FILES})
    monkeypatch.chdir(folder if name == "." else tmp_path)
    assert len(load_split(DataConfig("imagefolder", name), "train", size=8)) == 4


def test_a_table_without_images_among_class_folders_is_none_of_them(tmp_path):
    data = class_folders(tmp_path, "bus/0.png", "bus/1.png", "train/0.png")
    pq.write_table(pa.table({"path": ["0.png"], "embedding": [[0.1, 0.2]]}), tmp_path / "embeddings.parquet")
    assert labels_by_class(load_split(data, "train", size=8)) == {"bus": 2, "train": 1}


STRINGS = ["dog", "cat", None, "dog"]


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        (STRINGS, [1, 0, -1, 1], ["cat", "dog"]),
        (pa.array(STRINGS, pa.large_string()), [1, 0, -1, 1], ["cat", "dog"]),
        (pa.array(STRINGS).dictionary_encode(), [1, 0, -1, 1], ["cat", "dog"]),
        ([2, 0, None, 1], [2, 0, -1, 1], None),
        ([2.0, 0.0, float("nan"), None], [2, 0, -1, -1], None),
        ([True, False, True, None], [1, 0, 1, -1], None),
        ([-1, 3, -100, 0], [-1, 3, -1, 0], None),
        (pa.array([2**63, 7, None, 2**63], pa.uint64()), [1, 0, -1, 1], ["7", str(2**63)]),
        ([None] * 4, None, None),
        ([[0], [1, 2], [], None], None, None),
        ([{"a": 1}] * 4, None, None),
        ([b"x"] * 4, None, None),
        (pa.array([1, 2, 3, 4], pa.timestamp("s")), None, None),
    ],
)
def test_labels_of_every_kind(labels, numbers, names, tmp_path, caplog):
    data = plain_parquet(
        tmp_path, train={"image": FILES, "label": labels}, test={"image": FILES, "label": labels}
    )
    for images in load_splits(data, size=8):
        assert (None if images.labels is None else images.labels.tolist()) == numbers
        assert images.class_names == names and len(images) == 4
    if numbers is None and labels != [None] * 4:
        assert "(column 'label') are left out" in caplog.text


def test_splits_share_their_classes(tmp_path):
    splits = {"train": ["cat", "dog", "cat", "eel"], "test": ["eel", "dog", "bat", "eel"]}
    tables = {split: {"image": FILES, "label": labels} for split, labels in splits.items()}
    train_images, test_images = load_splits(plain_parquet(tmp_path, **tables), size=8)
    assert train_images.class_names == test_images.class_names == ["bat", "cat", "dog", "eel"]
    assert (train_images.labels.tolist(), test_images.labels.tolist()) == ([1, 2, 1, 3], [3, 2, 0, 3])


@pytest.mark.parametrize("labels", [[0.2, 0.9, 0.0, 1.0], [0.0, float("inf"), 1.0, 2.0]])
def test_fractions_are_no_classes(labels, tmp_path):
    data = plain_parquet(tmp_path, train={"image": FILES, "label": labels})
    with pytest.raises(CareHubError, match=r"column 'label'\) are no classes, e\.g\. (0\.|inf)"):
        load_split(data, "train", size=8)


@pytest.mark.parametrize("more", [{}, {"label": [None] * 4}, {"label": STRINGS, "extra": [1] * 4}])
def test_a_test_split_may_have_other_columns(more, tmp_path):
    data = plain_parquet(
        tmp_path, train={"image": FILES, "label": [0, 1, 0, 1]}, test={"image": FILES, **more}
    )
    train_images, test_images = load_splits(data, size=8)
    assert len(train_images) == len(test_images) == 4


SHARED_CASES = {
    "brackets-in-path": ({"a": 4, "b": 4}, None),
    "capital-Train-Test": ({"bus": 4, "car": 4}, {"bus": 2, "car": 2}),
    "class-called-train": ({"bus": 4, "car": 4, "train": 4}, None),
    "file-called-test": ({"bus": 5, "car": 4}, None),
    "hidden-files": ({"": 1}, None),
    "suffixes": ({"": 4 + (".avif" in Image.registered_extensions())}, None),
    "unlabelled-in-one-folder": ({"": 8}, {"": 4}),
}


@pytest.mark.parametrize("case", SHARED_CASES)
def test_shared_cases_of_class_folders(case, shared):
    (folder,) = shared(f"cases/{case}").glob("photos*")
    train_classes, test_classes = SHARED_CASES[case]
    train_images, test_images = load_splits(DataConfig("imagefolder", str(folder)), size=8)
    assert labels_by_class(train_images) == train_classes
    assert test_classes == (test_images and labels_by_class(test_images))


def test_shared_cases_of_labels(shared):
    def load(case):
        return load_splits(DataConfig("imagefolder", str(shared(f"cases/{case}"))), size=8)

    for images in load("string-labels"):
        assert images.class_names == ["cat", "dog"] and set(images.labels.tolist()) == {0, 1}
    assert [images.labels for images in load("multi-labels")] == [None, None]
    with pytest.raises(CareHubError, match="are no classes"):
        load("float-labels")


@pytest.mark.launches
def test_a_run_without_labels_or_test_split_still_ends(tmp_path):
    root = hub_layout(tmp_path / "data", {"train": 40}, "image", {})
    flags = ("--dataset-name", "a/b", "--data-root", root, "--image-size", "32", "--epochs", "2")
    train_here(tmp_path, *flags, "--run-name", "r")
    assert len(metrics(tmp_path / "r")) == 4

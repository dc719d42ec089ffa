"""`care-hub upgrade`: stored embeddings carried over to a new encoder by a map fitted on some of them."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import care_hub_command, killed_at_each_rename

from care_hub import embed_folder
from care_hub.embed_folder import read_embeddings
from care_hub.errors import CareHubError
from care_hub.rotation import Rotation
from care_hub.steering.upgrade import upgrade

N, D = 900, 8
ABOUT = {"encoder": "old", "space": "projection", "encoder_name": "old/name", "images": "/images"}
NEW = {"encoder": "new", "space": "projection", "encoder_name": "new/name", "revision": "abc"}
NAMES = [f"{k}.png" for k in range(N)]


def unit(z):
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def write(path, names, z, about, **options):
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.float32(z).reshape(-1)), z.shape[1])
    table = pa.table({"path": list(names), "embedding": vectors}).replace_schema_metadata(about)
    pq.write_table(table, path, **options)
    return str(path)


OLD_Z = unit(np.random.RandomState(0).standard_normal((N, D)))
TURNED = Rotation.random(D, 1)(OLD_Z)
OTHERS = unit(np.random.RandomState(1).standard_normal((N, D)))


@pytest.fixture
def old(tmp_path):
    """Two parts of several row groups, in a folder."""
    (tmp_path / "old").mkdir()
    for part, rows in enumerate((slice(0, 500), slice(500, N))):
        write(tmp_path / "old" / f"{part}.parquet", NAMES[rows], OLD_Z[rows], ABOUT, row_group_size=70)
    return str(tmp_path / "old")


@pytest.fixture
def pairs(tmp_path):
    """By the new encoder, which turns all: 400 of the images, in an order of their own, and one of others."""
    rows = np.random.RandomState(2).permutation(N)[:400]
    names = [*(NAMES[row] for row in rows), "other.png"]
    return write(tmp_path / "new.parquet", names, TURNED[[*rows, 0]], NEW)


def test_a_rotation_between_two_encoders_is_found_and_carries_all_over(old, pairs, tmp_path):
    said = care_hub_command("upgrade", old, "--pairs", pairs, "-o", tmp_path / "up.parquet")
    assert "900 embeddings of 8 numbers" in said
    assert "orthogonal map of 300 pairs, on 100 others: recall@10 100.0 %" in said
    names, z, about = read_embeddings(tmp_path / "up.parquet")
    assert names == NAMES
    np.testing.assert_allclose(z, TURNED, atol=1e-5)
    assert {key: about[key] for key in NEW} == NEW and about["images"] == "/images"
    origin = json.loads(about["carried_over"])
    assert (origin["from"], origin["from_name"], origin["map"]) == ("old", "old/name", "orthogonal")
    assert (origin["fitted_pairs"], origin["measured_pairs"]) == (300, 100)
    assert origin["recall_at_10"] == 100 and origin["recall_at_10_without_map"] < 50
    assert origin["cosine"] == pytest.approx(1) and origin["cosine_without_map"] < 0.9


@pytest.mark.parametrize("d", [5, 12])
def test_spaces_may_differ_in_dimensions(old, tmp_path, d):
    inside = OLD_Z * (np.arange(D) < 5)  # what both spaces have room for
    old = write(tmp_path / "old.parquet", NAMES, unit(inside), ABOUT)
    axes = Rotation.random(max(d, D), 3).matrix.numpy()[:d, :D] if d > D else np.eye(d, D)
    new = unit(unit(inside) @ axes.T)
    pairs = write(tmp_path / "new.parquet", NAMES[:400], new[:400], NEW)
    upgrade([old], pairs, str(tmp_path / "up.parquet"))
    _, z, about = read_embeddings(tmp_path / "up.parquet")
    np.testing.assert_allclose(z, new, atol=1e-5)
    assert json.loads(about["carried_over"])["recall_at_10_without_map"] is None


def test_a_linear_map_is_taken_where_it_is_better_and_maps_all(old, tmp_path):
    stretched = unit(TURNED * 2.0 ** np.arange(-4, 4))
    pairs = write(tmp_path / "new.parquet", NAMES[:400], 3 * stretched[:400], NEW)
    upgrade([old], pairs, str(tmp_path / "up.parquet"))
    _, z, about = read_embeddings(tmp_path / "up.parquet")
    origin = json.loads(about["carried_over"])
    assert origin["map"] == "linear" and origin["recall_at_10"] > 50
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-6)
    for rows in (slice(0, 400), slice(400, N)):  # those among the pairs are no nearer to the truth
        assert origin["cosine"] == pytest.approx((z * stretched)[rows].sum(axis=1).mean(), abs=0.02)


def test_what_can_not_be_carried_over_is_refused_and_leaves_no_file(old, pairs, tmp_path):
    def new(name, names=NAMES, z=OTHERS, about=NEW):
        return write(tmp_path / name, names, z, about)

    output = str(tmp_path / "up.parquet")
    for sources, pair, target, sentence in (
        ([old], new("poor.parquet"), output, r"can't be carried over: .* 50 % are needed"),
        ([old], new("few.parquet", NAMES[:150], TURNED[:150]), output, "150 images in common"),
        ([old], new("none.parquet", [f"x{name}" for name in NAMES]), output, "has 0 images in common"),
        ([old], new("same.parquet", about=ABOUT), output, "the same encoder"),
        ([old], new("unknown.parquet", about={}), output, "does not say which encoder"),
        ([old], new("carried.parquet", about=NEW | {"carried_over": "{}"}), output, "carried over itself"),
        ([new("nameless.parquet", about={})], pairs, output, "does not say which encoder"),
        ([old, old], pairs, output, "is twice among the old"),
        ([old, new("a.parquet", about=ABOUT | {"images": "/b"})], pairs, output, "several folders"),
        ([old, pairs], pairs, output, "several encoders"),
        ([old], pairs, pairs, "is read here"),
        ([old], pairs, str(tmp_path / "up.npy"), "must end in .parquet"),
        ([new("nan.parquet", z=OTHERS * np.nan, about=ABOUT)], pairs, output, "not finite"),
    ):
        with pytest.raises(CareHubError, match=sentence):
            upgrade(sources, pair, target)
    assert not (tmp_path / "up.parquet").exists()
    assert "recall@10" in upgrade([old], str(tmp_path / "poor.parquet"), output, force=True)
    assert len(read_embeddings(output)[0]) == N


def test_few_pairs_for_the_dimensions_warn(tmp_path, caplog):
    z = unit(np.random.RandomState(0).standard_normal((240, 64)))
    old = write(tmp_path / "old.parquet", NAMES[:240], z, ABOUT)
    pairs = write(tmp_path / "new.parquet", NAMES[:240], Rotation.random(64, 1)(z), NEW)
    upgrade([old], pairs, str(tmp_path / "up.parquet"))
    assert "180 pairs are few for a map in 64 dimensions; take 342 or more" in caplog.text


def test_killed_midway_it_leaves_what_was_there(old, pairs, tmp_path, monkeypatch):
    output = tmp_path / "up.parquet"
    output.write_bytes(b"before")
    states = []
    for _ in killed_at_each_rename(lambda: upgrade([old], pairs, str(output)), monkeypatch):
        states.append(output.read_bytes() == b"before")
        assert [path.name for path in tmp_path.glob(".writing-*")] == []
    assert states == [True, False]


def test_old_embeddings_are_read_and_written_in_parts(old, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_folder, "ROWS", 100)
    upgrade([old], pairs, str(tmp_path / "up.parquet"))
    with pq.ParquetFile(tmp_path / "up.parquet") as file:
        groups = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
    assert sum(groups) == N and max(groups) <= 140

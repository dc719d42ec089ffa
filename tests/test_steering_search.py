"""`care-hub search`: the nearest of stored embeddings to a query, which rotations may have turned."""

import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import TURN, care_hub_command

import care_hub
from care_hub.errors import CareHubError
from care_hub.steering.search import nearest, parse_steer, search

pytestmark = pytest.mark.launches


@pytest.fixture
def stored(rotations, export, photos, tmp_path):
    """An encoder with rotations, and a folder with the embeddings of images in two parts."""
    rotations.save(export)
    images = shutil.copytree(photos / "test", tmp_path / "images")
    (images / "cold" / "00.png").rename(images / "cold" / "<b>00.png")
    (tmp_path / "z").mkdir()
    for name in ("cold", "warm"):
        care_hub_command(
            "embed", images / name, "--encoder", export, "-o", tmp_path / "z" / f"{name}.parquet"
        )
    return tmp_path / "z"


def found(*words, ok=True):
    """(path, similarity) of each line; what was said where it is refused."""
    said = care_hub_command("search", *words, ok=ok)
    rows = [line.split("\t") for line in said.splitlines()]
    return [(path, float(similarity)) for path, similarity in rows] if ok else said


def embeddings(folder):
    table = pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]).to_pydict()
    return table["path"], np.array(table["embedding"], np.float32)


def test_it_finds_what_comparing_all_finds(stored, export, photos):
    query = photos / "train" / "warm" / "03.png"
    names, z = embeddings(stored)
    cosines = z @ care_hub.load_encoder(export).encode(query)[0]
    order = np.argsort(-cosines)[:5]
    rows = found(stored, "--query", query, "-k", "5")
    assert [path for path, _ in rows] == [names[k] for k in order]
    np.testing.assert_allclose([similarity for _, similarity in rows], cosines[order], atol=1e-4)
    assert found(stored / "cold.parquet", stored / "warm.parquet", "--query", query, "-k", "5") == rows
    assert len(found(stored, "--query", query, "-k", "100")) == 16
    itself = found(stored, "--query", photos / "test" / "cold" / "01.png", "-k", "1")
    assert itself == [("01.png", 1.0)]


def test_a_steered_search_equals_the_search_over_the_corpus_that_is_turned_back(stored, export, photos):
    query = photos / "train" / "warm" / "03.png"
    names, z = embeddings(stored)
    q = care_hub.load_encoder(export).encode(query)
    back = TURN.power(0.5).inv()(z) @ q[0]
    rows = search([str(stored)], str(query), steer=["brightness=1.4142135623730951"], k=16)
    expected = {name: cosine for name, cosine in zip(names[:8], back[:8], strict=True)}
    for hit in rows:
        if "cold" in hit.file:
            assert hit.similarity == pytest.approx(expected[hit.path], abs=1e-5)
    assert [hit.similarity for hit in rows] == sorted((hit.similarity for hit in rows), reverse=True)
    np.testing.assert_allclose([hit.similarity for hit in rows], np.sort(back)[::-1], atol=1e-5)
    unsteered = search([str(stored)], str(query), k=16)
    assert max(abs(a.similarity - b.similarity) for a, b in zip(rows, unsteered, strict=True)) > 1e-3
    turned = care_hub.load_rotations(export).turn(torch.from_numpy(q), {"brightness": 2.0})
    torch.testing.assert_close(turned, TURN(torch.from_numpy(q)), atol=1e-5, rtol=0)


def test_what_is_ignored_or_matched_decides_what_counts(stored, export, rotations, photos):
    query = photos / "train" / "warm" / "03.png"
    _, z = embeddings(stored)
    q = care_hub.load_encoder(export).encode(query)
    for flag, kept in (
        ("--ignore", {"ignore": ["brightness", "flip"]}),
        ("--match", {"match": ["brightness"]}),
    ):
        cosines = rotations.project(z, **kept) @ rotations.project(q, **kept)[0]
        rows = found(stored, "--query", query, flag, ",".join(*kept.values()), "-k", "16")
        np.testing.assert_allclose([cosine for _, cosine in rows], np.sort(cosines)[::-1], atol=1e-4)
    assert "no rotations of 'hue'" in found(stored, "--query", query, "--ignore", "hue", ok=False)


def test_the_page_shows_the_images_and_no_unescaped_name(stored, photos, tmp_path):
    page = tmp_path / "page.html"
    (tmp_path / "images" / "warm" / "01.png").unlink()
    found(stored, "--query", photos / "test" / "cold" / "00.png", "-k", "16", "-o", page)
    text = page.read_text()
    assert "<b>00" not in text and "&lt;b&gt;00.png" in text and "http" not in text
    assert len(re.findall(r'src="data:image/jpeg;base64,[\w+/=]+"', text)) == 1 + 15
    assert text.count('class="absent"') == 1


def test_what_can_not_be_searched_ends_in_one_sentence(stored, export, photos, tmp_path):
    query = ("--query", photos / "test" / "cold" / "01.png")
    for words, sentence in (
        ((stored, "--query", photos), "is a folder"),
        ((stored, "--query", stored / "cold.parquet"), "can't be decoded"),
        ((tmp_path / "absent", *query), "no file or folder"),
        ((photos, *query), "no .parquet file"),
        (
            (stored, *query, "--encoder", "resnet10_w16_small.care_shapes"),
            "is not the encoder of these embeddings",
        ),
        ((stored, *query, "--steer", "brightness"), "should look like"),
        ((stored, *query, "--steer", "brightness=much"), "should look like"),
        ((stored, *query, "--steer", "brightness=9"), "go from 0.5 to 2"),
        ((stored, *query, "--steer", "hue=0.1"), "no rotations of 'hue'"),
        (
            (stored, *query, "--steer", "flip=1"),
            "steered by flip (the same image is found: 50 %, 75 % are needed; --force",
        ),
    ):
        assert sentence in found(*words, ok=False)
    assert len(found(stored, *query, "--steer", "flip=1", "--force")) == 10
    (export / "rotations.safetensors").unlink()
    assert "has no rotations" in found(stored, *query, "--steer", "brightness=2", ok=False)
    other = tmp_path / "other.parquet"
    table = pq.read_table(stored / "cold.parquet")
    pq.write_table(table.replace_schema_metadata({b"encoder": b"0" * 64, b"space": b"projection"}), other)
    assert "several encoders" in found(stored, other, *query, ok=False)
    assert "does not name its encoder" in found(other, *query, ok=False)
    pq.write_table(table.replace_schema_metadata({}), other)
    assert "does not say which encoder" in found(other, *query, ok=False)


def test_large_files_are_searched_part_by_part(tmp_path):
    z = np.random.RandomState(0).standard_normal((20000, 8)).astype(np.float32)
    z[[17, 12345, 19999]] = z[17]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(z.reshape(-1)), 8)
    pq.write_table(pa.table({"embedding": vectors}), tmp_path / "z.parquet", row_group_size=700)
    rows = nearest([tmp_path / "z.parquet", tmp_path / "z.parquet"], z[17], 8)
    assert [(file, row) for file, row, _ in rows[:6]] == [(f, r) for f in (0, 1) for r in (17, 12345, 19999)]
    cosines = np.sort(z @ z[17] / np.linalg.norm(z, axis=1) / np.linalg.norm(z[17]))[::-1]
    np.testing.assert_allclose([cosine for _, _, cosine in rows[6:]], cosines[[3, 3]], atol=1e-6)
    for table in (pa.table({"embedding": z.tolist()}), pa.table({"other": [1]})):
        pq.write_table(table, tmp_path / "no.parquet")
        with pytest.raises(CareHubError, match="has no embeddings of 8 numbers"):
            nearest([tmp_path / "no.parquet"], z[17], 8)


def test_steers_are_names_and_strengths(rotations):
    assert parse_steer(rotations, ["brightness=1.4"]) == {"brightness": 1.4}
    with pytest.raises(CareHubError, match="twice"):
        parse_steer(rotations, ["brightness=1.4", "brightness=2"])

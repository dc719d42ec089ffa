"""`care-hub embed`: a folder becomes a table of embeddings."""

import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from conftest import run
from safetensors import safe_open

import care_hub
from care_hub import cli, embeddings
from care_hub.encoder import Encoder


def embed(*words):
    return CliRunner().invoke(cli.main, ["embed", *map(str, words)])


def test_a_folder_becomes_a_table_in_each_format(tiny_run, photos, tmp_path):
    folder = photos / "test"
    expected = care_hub.load_encoder(tiny_run).encode(folder)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))
    for suffix in ("parquet", "safetensors", "npy"):
        done = embed(folder, "--encoder", tiny_run, "-o", tmp_path / f"out.{suffix}")
        assert done.exit_code == 0 and "16 embeddings of 16 numbers" in done.output
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        stored, paths = file.get_tensor("embeddings"), json.loads(file.metadata()["paths"])
    assert table["path"] == paths == names
    for z in (np.array(table["embedding"], dtype=np.float32), stored, np.load(tmp_path / "out.npy", allow_pickle=False)):
        np.testing.assert_allclose(z, expected, atol=1e-6)


def test_the_installed_command_on_one_picture(tiny_run, photos, tmp_path):
    picture = next((photos / "test").rglob("*.png"))
    words = ("embed", picture, "--encoder", tiny_run / "export", "-o", tmp_path / "one.npy", "--space", "backbone")
    run("python", "-c", "from care_hub.cli import main; main()", *words)
    assert np.load(tmp_path / "one.npy").shape == (1, care_hub.load_encoder(tiny_run).backbone.num_features)


def words_for(run, folder, output):
    return [sys.executable, "-m", "care_hub", "embed", str(folder), "--encoder", str(run), "-o", str(output), "--batch-size", "8"]


@pytest.fixture(scope="module")
def many(photos, tmp_path_factory):
    """5,000 pictures, two parts."""
    folder = tmp_path_factory.mktemp("many")
    originals = sorted((photos / "test").rglob("*.png"))
    for k in range(5000):
        os.link(originals[k % len(originals)], folder / f"{k:05d}.png")
    return folder


def test_two_processes_write_what_one_reads(tiny_run, many, tmp_path):
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = run("python", *words, *words_for(tiny_run, many, tmp_path / "out.npy")[1:])
    assert done.stdout.count("5,000 embeddings") == 1 and [p.name for p in tmp_path.iterdir()] == ["out.npy"]
    expected = care_hub.load_encoder(tiny_run).encode(many)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)


def test_a_killed_command_goes_on_where_it_was(tiny_run, many, tmp_path):
    output = tmp_path / "out.parquet"
    process = subprocess.Popen(words_for(tiny_run, many, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "out.parquet.parts"
    while not list(parts.glob("*.npy")) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    (marked,) = parts.glob("*.npy")
    assert not output.exists()
    content = marked.read_bytes()
    marked.write_bytes(content[: len(content) // 2])
    done = embed(many, "--encoder", tiny_run, "-o", output)
    assert done.exit_code == 1 and f"'{marked}' is damaged" in done.output and not output.exists()
    marked.write_bytes(content)
    np.save(marked, np.full_like(np.load(marked), 0.5))  # to see that it is not made again
    assert embed(many, "--encoder", tiny_run, "-o", output).exit_code == 0
    z = np.array(pq.read_table(output).to_pydict()["embedding"], dtype=np.float32)
    assert len(z) == 5000 and (z == 0.5).all(axis=1).sum() == embeddings.PART and not parts.exists()
    expected = care_hub.load_encoder(tiny_run).encode(many)
    fresh = ~(z == 0.5).all(axis=1)
    np.testing.assert_allclose(z[fresh], expected[fresh], atol=1e-5)


def test_memory_does_not_grow_with_the_embeddings(tiny_run, many, tmp_path, monkeypatch):
    """A part at a time is held, on the way out too."""
    monkeypatch.setattr(embeddings, "PART", 64)
    held = []
    monkeypatch.setattr(Encoder, "embed", lambda self, x, *_: torch.ones(len(x), 4096))
    monkeypatch.setattr(Encoder, "_canvas", lambda self, item: torch.zeros(3, 1, 1, dtype=torch.uint8))
    for suffix in ("npy", "safetensors", "parquet"):
        tracemalloc.start()
        assert embed(many, "--encoder", tiny_run, "-o", tmp_path / f"out.{suffix}", "--batch-size", "64").exit_code == 0
        held.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(held) < 30 << 20  # all together are 78 MiB


def test_broken_pictures_are_named_and_left_out_on_demand(tiny_run, photos, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(photos / "test", folder)
    bad = sorted(folder.rglob("*.png"))[3]
    bad.write_bytes(bad.read_bytes()[:40])
    done = embed(folder, "--encoder", tiny_run, "-o", tmp_path / "out.npy")
    assert done.exit_code == 1 and str(bad) in done.output and not (tmp_path / "out.npy").exists()
    done = embed(folder, "--encoder", tiny_run, "-o", tmp_path / "out.npy", "--skip-broken-images")
    assert done.exit_code == 0 and str(bad) in done.output and "15 embeddings" in done.output and "1 broken" in done.output
    z = care_hub.load_encoder(tiny_run).encode([p for p in sorted(folder.rglob("*.png")) if p != bad])
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), z, atol=1e-6)


def test_an_encoder_that_gives_nan_is_no_broken_picture(tiny_run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "embed", lambda self, x, *_: torch.full((len(x), 16), torch.nan))
    done = embed(photos / "test", "--encoder", tiny_run, "-o", tmp_path / "out.npy", "--skip-broken-images")
    assert done.exit_code == 1 and "NaN" in done.output and not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pictures": "nowhere"}, "There is no file or folder 'nowhere'"),
        ({"output": "out.csv"}, "must end in .parquet"),
        ({"output": "absent/out.npy"}, "does not exist"),
        ({"encoder": "absent"}, "is not a folder, no Hub id"),
    ],
)
def test_what_a_person_gets_wrong(change, sentence, tiny_run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = {"pictures": photos / "test", "encoder": tiny_run, "output": "out.npy"} | change
    done = embed(words["pictures"], "--encoder", words["encoder"], "-o", words["output"])
    assert done.exit_code == 1 and sentence in done.output and "Traceback" not in done.output
    assert not (tmp_path / "out.npy").exists()

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
from helpers import TORCHRUN, care_hub_command, run
from safetensors import safe_open

import care_hub
from care_hub import embed_folder
from care_hub.data import inputs
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError

SUFFIXES = ("parquet", "safetensors", "npy")


def embed(*words, ok=True):
    return care_hub_command("embed", *words, ok=ok)


def launched(encoder, folder, output):
    """Words that embed in other processes, in small batches."""
    words = ("-m", "care_hub", "embed", folder, "--encoder", encoder, "-o", output, "--batch-size", "8")
    return list(map(str, words))


@pytest.fixture(scope="module")
def many(photos, tmp_path_factory):
    """5,000 images, two parts."""
    folder = tmp_path_factory.mktemp("many")
    originals = sorted((photos / "test").rglob("*.png"))
    for k in range(5000):
        os.link(originals[k % len(originals)], folder / f"{k:05d}.png")
    return folder


def test_a_folder_becomes_a_table_in_each_format(tiny_run, photos, tmp_path):
    folder = photos / "test"
    expected = care_hub.load_encoder(tiny_run).encode(folder)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))
    for suffix in SUFFIXES:
        said = embed(folder, "--encoder", tiny_run, "-o", tmp_path / f"out.{suffix}")
        assert "16 embeddings of 16 numbers" in said
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        stored, paths = file.get_tensor("embeddings"), json.loads(file.metadata()["paths"])
    assert table["path"] == paths == names
    in_parquet = np.array(table["embedding"], dtype=np.float32)
    for z in (in_parquet, stored, np.load(tmp_path / "out.npy", allow_pickle=False)):
        assert z.dtype == np.float32
        np.testing.assert_allclose(z, expected, atol=1e-6)


def test_a_file_of_embeddings_says_which_encoder_made_it(tiny_run, photos, tmp_path):
    encoder = care_hub.load_encoder(tiny_run)
    for suffix in SUFFIXES:
        path, torn = tmp_path / f"z.{suffix}", tmp_path / f"torn.{suffix}"
        embed(photos / "test", "--encoder", tiny_run, "-o", path)
        assert care_hub.fingerprint_of(path) == (None if suffix == "npy" else encoder.fingerprint)
        torn.write_bytes(path.read_bytes()[:50])
        for wrong in (torn, tmp_path / f"absent.{suffix}"):
            with pytest.raises(CareHubError, match="not a file of embeddings"):
                care_hub.fingerprint_of(wrong)


@pytest.mark.launches
def test_the_installed_command_on_one_image(tiny_run, photos, tmp_path):
    image, output = next((photos / "test").rglob("*.png")), tmp_path / "one.npy"
    words = ("embed", image, "--encoder", tiny_run / "export", "-o", output, "--space", "backbone")
    run("python", "-c", "from care_hub.cli import main; main()", *words)
    assert np.load(output).shape == (1, care_hub.load_encoder(tiny_run).backbone.num_features)


@pytest.mark.launches
def test_two_processes_write_what_one_reads(tiny_run, many, tmp_path):
    done = run(*TORCHRUN, *launched(tiny_run, many, tmp_path / "out.npy"))
    assert done.stdout.count("5,000 embeddings") == 1 and [p.name for p in tmp_path.iterdir()] == ["out.npy"]
    expected = care_hub.load_encoder(tiny_run).encode(many)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)


@pytest.mark.launches
def test_a_killed_command_resumes(tiny_run, many, tmp_path):
    output = tmp_path / "out.parquet"
    words = [sys.executable, *launched(tiny_run, many, output)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "out.parquet.parts"
    while not list(parts.glob("*.npy")) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    (marked,) = parts.glob("*.npy")
    assert not output.exists()
    content = marked.read_bytes()
    marked.write_bytes(content[: len(content) // 2])
    said = embed(many, "--encoder", tiny_run, "-o", output, ok=False)
    assert f"'{marked}' is damaged" in said and not output.exists()
    marked.write_bytes(content)
    np.save(marked, np.full_like(np.load(marked), 0.5))  # to see that it is not made again
    embed(many, "--encoder", tiny_run, "-o", output)
    z = np.array(pq.read_table(output).to_pydict()["embedding"], dtype=np.float32)
    fresh = ~(z == 0.5).all(axis=1)
    assert len(z) == 5000 and (~fresh).sum() == embed_folder.PART
    assert [p.name for p in tmp_path.iterdir()] == ["out.parquet"]
    expected = care_hub.load_encoder(tiny_run).encode(many)
    np.testing.assert_allclose(z[fresh], expected[fresh], atol=1e-5)


def test_memory_does_not_grow_with_the_embeddings(tiny_run, many, tmp_path, monkeypatch):
    """One part at a time is in memory, on the way out too."""
    monkeypatch.setattr(embed_folder, "PART", 64)
    monkeypatch.setattr(Encoder, "embed", lambda self, x, *_: torch.ones(len(x), 4096))
    monkeypatch.setattr(inputs, "decode_item", lambda *_: torch.zeros(3, 1, 1, dtype=torch.uint8))
    peaks = []
    for suffix in SUFFIXES:
        words = (many, "--encoder", tiny_run, "-o", tmp_path / f"out.{suffix}", "--batch-size", "64")
        tracemalloc.start()
        embed(*words)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 30 << 20  # all together are 78 MiB


def test_broken_images_are_named_and_left_out_on_demand(tiny_run, photos, tmp_path):
    folder, output = tmp_path / "images", tmp_path / "out.npy"
    shutil.copytree(photos / "test", folder)
    bad = sorted(folder.rglob("*.png"))[3]
    bad.write_bytes(bad.read_bytes()[:40])
    words = (folder, "--encoder", tiny_run, "-o", output)
    assert str(bad) in embed(*words, ok=False) and not output.exists()
    said = embed(*words, "--skip-broken-images")
    assert f"left out: {bad}" in said and "15 embeddings" in said and "1 broken" in said
    z = care_hub.load_encoder(tiny_run).encode([p for p in sorted(folder.rglob("*.png")) if p != bad])
    np.testing.assert_allclose(np.load(output), z, atol=1e-6)


def test_an_encoder_that_gives_nan_is_no_broken_image(tiny_run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "embed", lambda self, x, *_: torch.full((len(x), 16), torch.nan))
    output = tmp_path / "out.npy"
    said = embed(photos / "test", "--encoder", tiny_run, "-o", output, "--skip-broken-images", ok=False)
    assert "NaN" in said and not output.exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"images": "nowhere"}, "There is no file or folder 'nowhere'"),
        ({"output": "out.csv"}, "must end in .parquet"),
        ({"output": "absent/out.npy"}, "does not exist"),
        ({"encoder": "absent"}, "is not a folder, no Hub id"),
    ],
)
def test_user_errors_end_in_one_sentence(change, sentence, tiny_run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = {"images": photos / "test", "encoder": tiny_run, "output": "out.npy"} | change
    assert sentence in embed(words["images"], "--encoder", words["encoder"], "-o", words["output"], ok=False)
    assert not (tmp_path / "out.npy").exists()


def test_an_output_without_room_is_a_user_error_too(tiny_run, photos, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    words = (photos / "test", "--encoder", tiny_run, "-o", tmp_path / "out.npy")
    assert "can't be written (No space left on device)" in embed(*words, ok=False)
    monkeypatch.undo()
    embed(*words)
    assert [p.name for p in tmp_path.iterdir()] == ["out.npy"]

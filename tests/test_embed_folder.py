"""`care-hub embed`: a folder becomes a table of embeddings."""

import json
import os
import resource
import shutil
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import care_hub_command, killed_at_each_rename, run, run_forked
from processes import script, start, status
from safetensors import safe_open

import care_hub
from care_hub import embed_folder
from care_hub.data import inputs
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.hub.export import folder_lock

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


@pytest.mark.slow
def test_two_processes_write_what_one_reads(tiny_run, many, tmp_path):
    done = run_forked(*launched(tiny_run, many, tmp_path / "out.npy"), processes=2)
    assert done.stdout.count("5,000 embeddings") == 1 and [p.name for p in tmp_path.iterdir()] == ["out.npy"]
    expected = care_hub.load_encoder(tiny_run).encode(many)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)


def embed_until_killed(*words):
    """Parts of 16 images, of which the second is never there."""
    rename, embed_folder.PART = os.replace, 16

    def rename_one(source, target):
        if list(Path(target).parent.glob("*.npy")):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = rename_one
    script(*words)


@pytest.mark.launches
def test_a_killed_command_resumes(tiny_run, photos, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(embed_folder, "PART", 16)
    many, output = photos / "train", tmp_path / "out.parquet"
    said = tmp_path_factory.mktemp("said")
    process = start(said, embed_until_killed, *launched(tiny_run, many, output))
    assert status(process) == -signal.SIGKILL
    (marked,) = (tmp_path / "out.parquet.parts").glob("*.npy")
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
    assert len(z) == 48 and (~fresh).sum() == embed_folder.PART
    assert [p.name for p in tmp_path.iterdir()] == ["out.parquet"]
    expected = care_hub.load_encoder(tiny_run).encode(many)
    np.testing.assert_allclose(z[fresh], expected[fresh], atol=1e-5)


@pytest.mark.slow
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
    """A file as large as it may be ends as a full disk does, in the first part or, larger, the output."""
    monkeypatch.setattr(embed_folder, "PART", 4)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for suffix in SUFFIXES:
        words = (photos / "test", "--encoder", tiny_run, "-o", tmp_path / f"out.{suffix}")
        for limit in (300, 800):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                said = embed(*words, ok=False)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert "can't be written (File too large); once that is mended, the same" in said
            assert not (tmp_path / f"out.{suffix}").exists()
        assert "16 of 16 images were embedded before." in embed(*words)
    assert {p.name for p in tmp_path.iterdir()} == {f"out.{suffix}" for suffix in SUFFIXES}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_whenever_it_is_killed_the_rows_are_those_of_an_uninterrupted_call(
    suffix, tiny_run, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(embed_folder, "PART", 8)
    words = (str(photos / "test"), str(tiny_run), str(tmp_path / f"out.{suffix}"), "projection", 4, False)
    written = []
    for _ in killed_at_each_rename(lambda: embed_folder.embed_folder(*words), monkeypatch):
        written.append((tmp_path / f"out.{suffix}").exists())
    assert written == [False, False, True]  # the third call had but the second part to make
    resumed = (tmp_path / f"out.{suffix}").read_bytes()
    embed_folder.embed_folder(*words)
    assert (tmp_path / f"out.{suffix}").read_bytes() == resumed


def test_two_calls_at_once_for_one_output_are_refused(tiny_run, photos, tmp_path):
    words = (photos / "test", "--encoder", tiny_run, "-o", tmp_path / "out.npy")
    parts = tmp_path / "out.npy.parts"
    parts.mkdir()
    with folder_lock(parts):
        assert f"nother process is writing '{parts}'" in embed(*words, ok=False)
    embed(*words)


def test_an_image_that_changes_while_it_is_embedded(tiny_run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_folder, "PART", 4)
    folder = shutil.copytree(photos / "test" / "cold", tmp_path / "images")
    words = (folder, "--encoder", tiny_run, "-o", tmp_path / "out.npy", "--batch-size", 4)
    originals, embedded = {path: path.read_bytes() for path in sorted(folder.iterdir())}, Encoder.embed

    def changed(self, x, *rest):
        list(originals)[5].write_bytes(b"half")
        return embedded(self, x, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "embed", changed)
        said = embed(*words, "--skip-broken-images", ok=False)
    assert "among those from '04.png' to '07.png' changed meanwhile" in said
    list(originals)[5].write_bytes(originals[list(originals)[5]])
    embed(*words)
    expected = care_hub.load_encoder(tiny_run).encode(folder)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)


def test_what_an_interrupted_call_left_out_is_left_out_by_no_other(tiny_run, photos, tmp_path, monkeypatch):
    folder, output = shutil.copytree(photos / "test" / "cold", tmp_path / "images"), tmp_path / "out.npy"
    (folder / "03.png").write_bytes(b"broken")
    words = (folder, "--encoder", tiny_run, "-o", output)
    with monkeypatch.context() as patch:
        patch.setattr(embed_folder.PartialEmbeddings, "join", lambda *_: "")
        embed(*words, "--skip-broken-images")
    assert "03.png" in embed(*words, ok=False) and not output.exists()


@pytest.mark.parametrize("change", ["size", "time", "added", "removed", "renamed", "encoder"])
def test_what_changed_since_an_interruption_is_embedded_again(
    change, tiny_run, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(embed_folder, "PART", 4)
    folder, output = shutil.copytree(photos / "test" / "cold", tmp_path / "images"), tmp_path / "out.npy"
    encoder = shutil.copytree(tiny_run / "export", tmp_path / "encoder")
    images = sorted(folder.iterdir())
    other = (photos / "test" / "warm" / "00.png").read_bytes().ljust(20_000, b"\0")
    images[5].write_bytes(images[5].read_bytes().ljust(20_000, b"\0"))

    def interrupted(*_):
        raise OSError(28, "No space left on device")

    words = (folder, "--encoder", encoder, "-o", output)
    with monkeypatch.context() as patch:
        patch.setattr(embed_folder.PartialEmbeddings, "join", interrupted)
        assert "before" not in embed(*words, ok=False)
    assert len(list((tmp_path / "out.npy.parts").glob("*.npy"))) == 2
    time_before = images[5].stat().st_mtime_ns
    if change == "size":
        images[5].write_bytes(other + b"\0")
        os.utime(images[5], ns=(time_before, time_before))
    elif change == "time":
        images[5].write_bytes(other)
        os.utime(images[5], ns=(time_before, time_before - 1_000_000))
    elif change == "added":
        (folder / "zz.png").write_bytes(other)
    elif change == "removed":
        images[6].unlink()
    elif change == "renamed":
        images[6].rename(folder / "zz.png")
    else:
        larger = Encoder.new("resnet10_w16_small", hidden=32, outputs=16)
        shutil.rmtree(encoder)
        larger.save_pretrained(encoder)
    said = embed(*words)
    if change == "encoder":
        assert "2 parts are made again" in said and "before." not in said
    elif change == "added":
        assert "8 of 9 images were embedded before." in said and "again" not in said
    else:
        assert "4 of" in said and "images were embedded before. 1 part is made again" in said
    expected = care_hub.load_encoder(encoder).encode(sorted(folder.iterdir()))
    np.testing.assert_allclose(np.load(output), expected, atol=1e-6)


@pytest.fixture
def odd_names(photos, tmp_path):
    """Images whose names are no UTF-8, or hold what would forge rows or drive a terminal."""
    folder, image = tmp_path / "odd", next((photos / "test").rglob("*.png"))
    folder.mkdir()
    names = (b"caf\xe9.png", b"tab\there.png", b"two\nlines.png", b"\x1b[31mred.png", b"plain.png")
    for name in names:
        try:
            shutil.copy(os.fsencode(image), os.path.join(os.fsencode(folder), name))
        except OSError:
            pytest.skip("this file system takes UTF-8 only")
    return folder


def test_odd_names_are_written_into_each_format(tiny_run, odd_names, tmp_path):
    for suffix in SUFFIXES:
        said = embed(odd_names, "--encoder", tiny_run, "-o", tmp_path / f"out.{suffix}")
        assert "5 embeddings" in said
    paths = pq.read_table(tmp_path / "out.parquet").to_pydict()["path"]
    expected = sorted(os.listdir(odd_names))
    assert paths == [name.replace("\udce9", "\\udce9") for name in expected]
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        assert json.loads(file.metadata()["paths"]) == expected


def test_odd_names_are_one_row_each_on_the_screen(odd_names):
    said = care_hub_command("classify", odd_names, "--encoder", "resnet10_w16_small.care_shapes")
    rows = [line.split("\t") for line in said.splitlines()]
    assert [len(row) for row in rows] == [3] * 5 and "\x1b" not in said
    shown = {row[0] for row in rows}
    assert shown == {
        "caf\\udce9.png", "tab\\there.png", "two\\nlines.png", "\\x1b[31mred.png", "plain.png",
    }  # fmt: skip


def test_odd_names_of_broken_images_are_one_line_each(tiny_run, odd_names, tmp_path):
    for path in odd_names.iterdir():
        if path.name != "plain.png":
            path.write_bytes(b"no image")
    words = (odd_names, "--encoder", tiny_run, "-o", tmp_path / "out.npy")
    said = embed(*words, ok=False)
    assert "can't be decoded" in said and "\x1b" not in said
    said = embed(*words, "--skip-broken-images")
    assert "\x1b" not in said and said.count("\nleft out: ") + said.startswith("left out: ") == 4


@pytest.mark.launches
def test_odd_names_end_no_command_on_a_real_terminal(odd_names, tmp_path):
    """stdout of a process is strict, of a test it may be not; also where it can hold ASCII only."""
    name = "resnet10_w16_small.care_shapes"
    words = ("classify", odd_names, "--encoder", name)
    done = run("python", "-m", "care_hub", *words, env={"PYTHONIOENCODING": "ascii"})
    assert "caf\\udce9.png" in done.stdout
    output = tmp_path / os.fsdecode(b"\xe9.npy")
    done = run_forked("-m", "care_hub", "embed", odd_names, "--encoder", name, "-o", output)
    assert "5 embeddings of 128 numbers" in done.stdout and output.is_file()


def test_files_of_embeddings_follow_the_umask(tiny_run, photos, tmp_path):
    before = os.umask(0o027)
    try:
        for suffix in SUFFIXES:
            embed(photos / "test", "--encoder", tiny_run, "-o", tmp_path / f"out.{suffix}")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}

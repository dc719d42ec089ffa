"""`care-hub embed`: a folder becomes a table of embeddings."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import run
from safetensors import safe_open

import care_hub
from care_hub import cli


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

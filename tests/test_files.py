"""Files are written whole or not at all, for all whom the umask lets read them."""

import os
import shutil
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import care_hub
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.files import read_header, read_tensors, replacement, write_tensors, write_text
from care_hub.hub.card import write_card
from care_hub.hub.evaluation_record import add_result, read_record
from care_hub.hub.export import export_folder
from care_hub.hub.linear_head import LinearHead
from care_hub.rotation import Rotation
from care_hub.training.checkpoint import CheckpointWriter, load_checkpoint


def head() -> LinearHead:
    return LinearHead("pets", torch.ones(2, 128), torch.zeros(2), ["cat", "dog"], {"top1": 50.0})


def write_all(folder: Path) -> None:
    """Whatever the library writes without training."""
    export = Encoder.new("resnet10_w16_small", hidden=8, outputs=4).save_pretrained(folder / "export")
    head().save(export)
    add_result(export, "accuracy", "pets", {"kNN": {"top1": 50.0}})
    write_card(export)
    Rotation.random(3).save(folder / "rotation.safetensors")
    writer = CheckpointWriter(folder / "checkpoints")
    writer.save(1, {"w": torch.zeros(2)}, {"state": {0: {"m": torch.ones(2)}}, "param_groups": []}, {})
    writer.wait()


def modes(folder: Path) -> dict[str, int]:
    """The permissions of all files below `folder`, of locks too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in files}


@contextmanager
def umask(value: int):
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def foreign(tmp_path):
    """A folder with all that the library writes, none of which this user (also root) may touch."""
    other, mine = 65534, os.geteuid()
    folder = Path(tempfile.mkdtemp())  # pytest's own are closed to other users
    write_all(folder)
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if mine == 0:
        os.seteuid(other)
    yield folder
    os.seteuid(mine)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o700)
    shutil.rmtree(folder)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002, 0o077])
def test_files_follow_the_umask(mask, tmp_path):
    """safetensors writes 0600: weights that no colleague, web server or container could read."""
    with umask(mask):
        write_all(tmp_path)
    found = modes(tmp_path)
    assert {"export/model.safetensors", "export/linear_head.pets.safetensors"} < found.keys()
    assert {"rotation.safetensors", "checkpoints/step-00000001/optimizer.safetensors"} < found.keys()
    assert set(found.values()) == {0o666 & ~mask}, found


def test_files_that_replace_others_follow_the_umask_too(export):
    (export / "README.md").chmod(0o600)
    with umask(0o022):
        head().save(export)
        write_card(export)
    found = modes(export)
    changed = ("README.md", "config.json", "linear_head.pets.safetensors")
    assert {found[name] for name in changed} == {0o644}


def test_what_may_not_be_written_is_a_sentence(foreign):
    export, denied = foreign / "export", r"can't be written \(Permission denied\)"
    for write in (
        lambda: write_text(export / "new", ""),
        lambda: write_text(export / "README.md", ""),
        lambda: write_tensors(export / "model.safetensors", {"a": torch.ones(1)}),
        lambda: head().save(export),
        lambda: write_card(export),
        lambda: add_result(export, "accuracy", "pets", {"kNN": {"top1": 50.0}}),
        lambda: Rotation.random(3).save(foreign / "rotation.safetensors"),
        lambda: Encoder.new("resnet10_w16_small", hidden=8, outputs=4).save_pretrained(foreign / "a" / "b"),
    ):
        with pytest.raises(CareHubError, match=denied):
            write()
    writer = CheckpointWriter(foreign / "checkpoints")
    writer.save(2, {"w": torch.zeros(2)}, {"state": {}, "param_groups": []}, {})
    with pytest.raises(CareHubError, match=f"checkpoint of step 2 can't be written: .*{denied}"):
        writer.wait()


def test_what_may_not_be_read_is_a_sentence(foreign):
    read = {
        "export/model.safetensors": lambda: care_hub.load_encoder(foreign),
        "export/config.json": lambda: care_hub.load_encoder(foreign),
        "export/projection.safetensors": lambda: read_header(foreign / "export" / "projection.safetensors"),
        "export/linear_head.pets.safetensors": lambda: care_hub.load_linear_head(foreign),
        "export": lambda: export_folder(foreign),
        "export/evaluation.json": lambda: read_record(foreign / "export"),
        "rotation.safetensors": lambda: Rotation.load(foreign / "rotation.safetensors"),
        "checkpoints/step-00000001/model.safetensors": lambda: load_checkpoint(
            foreign / "checkpoints" / "step-00000001"
        ),
    }
    user = os.geteuid()
    for name, function in read.items():
        path = foreign / name
        os.seteuid(path.stat().st_uid)
        mode = path.stat().st_mode
        path.chmod(0)
        os.seteuid(user)
        with pytest.raises(CareHubError, match=r"[Pp]ermission ?[Dd]enied|PermissionError"):
            function()
        os.seteuid(path.stat().st_uid)
        path.chmod(mode)
        os.seteuid(user)


def test_a_file_where_a_folder_belongs_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (
        lambda: write_text(tmp_path / "file" / "README.md", ""),
        lambda: write_text(tmp_path / "absent" / "README.md", ""),
        lambda: head().save(tmp_path / "file"),
        lambda: Rotation.random(3).save(tmp_path / "absent" / "rotation.safetensors"),
        lambda: Rotation.random(3).save(tmp_path / ("x" * 5000)),
    ):
        with pytest.raises(CareHubError, match="can't be written"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    text, tensors = tmp_path / "README.md", tmp_path / "model.safetensors"
    write_text(text, "old, with an ö")
    write_tensors(tensors, {"a": torch.ones(2)}, {"by": "a test"})
    with pytest.raises(RuntimeError), replacement(text) as new:
        new.write_text("half")
        raise RuntimeError
    with pytest.raises(ValueError, match="non contiguous"):
        write_tensors(tensors, {"a": torch.ones(2, 3).T})
    assert text.read_text(encoding="utf-8") == "old, with an ö"
    assert torch.equal(read_tensors(tensors, {"a": torch.ones(2)})["a"], torch.ones(2))
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "model.safetensors"}


def test_names_that_are_no_utf8_end_no_file(tmp_path):
    write_text(tmp_path / "README.md", "load_encoder('caf\udce9')")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == r"load_encoder('caf\udce9')"


def test_what_is_written_into_a_cache_replaces_links_and_not_what_they_point_to(tmp_path):
    (tmp_path / "blob").write_text("shared")
    (tmp_path / "README.md").symlink_to(tmp_path / "blob")
    write_text(tmp_path / "README.md", "mine")
    assert (tmp_path / "blob").read_text() == "shared" and (tmp_path / "README.md").read_text() == "mine"

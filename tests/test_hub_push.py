"""What leaves for the Hub comes back the same, or not at all. The client is the real one."""

import json

import huggingface_hub
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import (
    IMAGES,
    PHOTO,
    TINY,
    care_hub_command,
    metrics,
    refusal,
    run,
    snippets,
    stored,
    train_here,
    visible,
)
from loopback_hub import READER, WRITER

import care_hub
from care_hub import cli
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.hub.push import push_folder
from care_hub.hub.registry import SHIPPED

pytestmark = pytest.mark.launches


def test_pushed_and_loaded_in_a_fresh_process_with_a_fresh_cache_it_is_the_same(server, export, tmp_path):
    url = push_folder(export, "lab/tiny", private=True)
    assert url.startswith(f"{server.url}/lab/tiny/commit/")
    content = stored(server, "lab/tiny")
    for name in (
        "config.json",
        "model.safetensors",
        "projection.safetensors",
        "linear_head.shapes.safetensors",
    ):
        assert content[name] == (export / name).read_bytes()
    np.save(tmp_path / "images.npy", IMAGES)
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    load = (
        "import sys, numpy as np, care_hub; e = care_hub.load_encoder('lab/tiny'); x = np.load(sys.argv[1])\n"
        "np.savez(sys.argv[2], z=e.encode(x), h=e.encode(x, space='backbone'))\n"
        "print(care_hub.load_classifier('lab/tiny').classify(x).labels)"
    )
    plain = "import sys, numpy; sys.modules['care_hub'] = None\n" + snippets(content["README.md"].decode())[1]
    plain += "\nnumpy.save(sys.argv[1], features.numpy())"
    run("python", "-c", load, tmp_path / "images.npy", tmp_path / "care.npz", env=environment)
    run("python", "-c", plain, tmp_path / "timm.npy", env=environment)
    encoder, found = care_hub.load_encoder(export), np.load(tmp_path / "care.npz")
    np.testing.assert_array_equal(found["z"], encoder.encode(IMAGES))
    expected = encoder.encode(PHOTO, space="backbone")
    np.testing.assert_allclose(np.load(tmp_path / "timm.npy"), expected, atol=1e-5)
    asked = sum(server.requests.values())
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    labels = run("python", "-c", load, tmp_path / "images.npy", tmp_path / "again.npz", env=offline).stdout
    np.testing.assert_array_equal(np.load(tmp_path / "again.npz")["z"], found["z"])
    assert "class" in labels and sum(server.requests.values()) == asked


def test_a_push_leaves_the_folder_as_it_is(server, export):
    """The card in the folder was rewritten to the name of the repository."""
    (export / "neighbors.png").write_bytes(b"PNG")
    (export / "notes.txt").write_text("not for the Hub")
    before = visible(export)
    push_folder(export, "lab/tiny")
    push_folder(export.parent, "lab/other")  # as a run folder
    assert visible(export) == before
    for name in ("lab/tiny", "lab/other"):
        card = stored(server, name)["README.md"].decode()
        assert f'load_encoder("{name}")' in card and str(export) not in card
        assert set(stored(server, name)) == set(before) - {"notes.txt"}


@pytest.mark.parametrize(
    "name, data",
    [
        ("resnet10_w16_small.care_shapes", "`shapes` is made by care_hub itself."),
        ("resnet10_w32_small.care_cifar10", "`cifar10` is `uoft-cs/cifar10` on the Hub."),
    ],
)
def test_an_encoder_of_the_package_is_published_by_its_name(server, name, data):
    before = visible(SHIPPED / name)
    assert "/lab/copy/commit/" in care_hub_command("push", name, "lab/copy")
    content, own = stored(server, "lab/copy"), before.keys() - {"README.md"}
    assert {file: content[file] for file in own} == {file: before[file] for file in own}
    card = content["README.md"].decode()
    assert 'load_encoder("lab/copy")' in card and f"- {data}" in card
    assert visible(SHIPPED / name) == before


def test_a_name_that_is_nearly_one_of_the_package_is_answered_with_it(server):
    name = "resnet10_w16_small.care_shapes"
    said = care_hub_command("push", "resnet10_w16_smal.care_shapes", "lab/shapes", ok=False)
    assert f"did you mean '{name}'?" in said


def test_revisions_private_repositories_and_pull_requests(server, export, tmp_path, monkeypatch):
    push_folder(export, "alice/secret", private=True)
    other = Encoder.new("resnet10_w16_small", hidden=32, outputs=16)
    other.push_to_hub("alice/secret", revision="v2", commit_message="second")
    for revision, expected in (("main", care_hub.load_encoder(export)), ("v2", other)):
        loaded = care_hub.load_encoder("alice/secret", revision=revision, cache_dir=tmp_path / "cache")
        np.testing.assert_allclose(loaded.encode(IMAGES), expected.encode(IMAGES), atol=1e-6)
    (export / "neighbors.png").write_bytes(b"PNG")
    url = push_folder(export, "alice/secret", create_pr=True, commit_message="third")
    assert url.endswith("/discussions/1")
    assert "neighbors.png" in stored(server, "alice/secret", "refs/pr/1")
    assert "neighbors.png" not in stored(server, "alice/secret")
    with pytest.raises(CareHubError, match="'alice/secret' has no revision 'v3'"):
        care_hub.load_encoder("alice/secret", revision="v3", cache_dir=tmp_path / "cache")
    monkeypatch.setenv("HF_TOKEN", READER)
    for token in (READER, None):
        with pytest.raises(CareHubError, match="no repository 'alice/secret' on the Hub that you may see"):
            care_hub.load_encoder("alice/secret", token=token, cache_dir=tmp_path / "other")
    assert care_hub.load_encoder("alice/secret", token=WRITER, cache_dir=tmp_path / "other")


OLD_CLIENT = tuple(map(int, huggingface_hub.__version__.split(".")[:2])) < (1, 10)  # which asks but once


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(
            {
                "PUT /lfs": [503],
                "/preupload/": [500],
                "POST /api/models/lab/tiny/commit": [429, "lost"],
                "repos/create": [503],
            },
            marks=pytest.mark.skipif(OLD_CLIENT, reason="more than our own attempts outlast"),
        ),
        {"PUT /lfs": [503], "/preupload/": [500], "POST /api/models/lab/tiny/commit": ["lost"]},
        {"POST /api/models/lab/tiny/commit": [429], "repos/create": [503]},
    ],
    ids=["all", "files", "repository"],
)
def test_an_unchanged_push_changes_nothing_and_a_broken_one_is_finished(server, export, faults):
    server.faults = faults
    push_folder(export, "lab/tiny")
    assert not any(server.faults.values())  # all of them happened
    count = len(server.repositories["lab/tiny"].commits)
    asked = server.requests["POST /api/models/lab/tiny/commit/main"]
    push_folder(export, "lab/tiny")
    assert len(server.repositories["lab/tiny"].commits) == count
    assert server.requests["POST /api/models/lab/tiny/commit/main"] == asked  # not even an empty commit
    assert stored(server, "lab/tiny")["model.safetensors"] == (export / "model.safetensors").read_bytes()


def test_a_readme_of_absurd_size_is_not_swallowed(server, export):
    server.put("lab/huge", {"README.md": b"x" * (50 << 20)})
    with pytest.raises(CareHubError, match="README of 'lab/huge' has 50 MB"):
        push_folder(export, "lab/huge")


def test_train_checks_token_and_name_before_it_trains(server, tmp_path, monkeypatch):
    flags = ("--save-root", tmp_path, *TINY, "--max-steps", "2", "--push-to-hub")
    assert "'nowhere' is not a name" in refusal(*flags, "nowhere")
    assert "can't write to 'carol/x'; its names are alice, lab" in refusal(*flags, "carol/x")
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "may only read" in refusal(*flags, "bob/x")
    monkeypatch.setenv("HF_TOKEN", "hf_nobodynobody")
    assert "does not know you" in refusal(*flags, "lab/x")
    assert not list(tmp_path.iterdir())


def test_a_push_that_fails_at_the_end_keeps_the_run(server, tmp_path):
    flags = ("--max-steps", "2", "--push-to-hub", "lab/new")
    server.faults = {"repos/create": [500] * 20}
    said = refusal("--save-root", tmp_path, *TINY, *flags, "--run-name", "a")
    assert f"care-hub push {tmp_path / 'a'} lab/new" in said and (tmp_path / "a" / "results.json").is_file()
    assert len(metrics(tmp_path / "a")) == 2
    server.faults = {}
    done = CliRunner().invoke(cli.main, ["push", str(tmp_path / "a"), "lab/new"])
    assert done.exit_code == 0 and "/lab/new/commit/" in done.output
    assert "Pushed" in train_here(tmp_path, *flags, "--run-name", "b")
    text = stored(server, "lab/new")["README.md"].decode()
    assert str(tmp_path) not in stored(server, "lab/new")["config.json"].decode() + text
    assert json.loads(stored(server, "lab/new")["config.json"])["care"]["model"] == "resnet10_w16_small"

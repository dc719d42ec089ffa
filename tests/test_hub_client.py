"""What comes back from the Hub is whole, or one sentence without a token. The client is the real one."""

import logging
import os
import socket
import time
from contextlib import ExitStack
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import IMAGES, edited, stored
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import logging as hub_logging
from loopback_hub import READER, WRITER

import care_hub
from care_hub import cli
from care_hub.errors import CareHubError
from care_hub.hub import client
from care_hub.hub.client import ask, check_name, check_push
from care_hub.hub.push import push_folder

pytestmark = pytest.mark.launches


def test_a_hub_that_stays_broken_is_one_sentence(server, export):
    server.faults = {"/commit/": [503] * 20}
    with pytest.raises(
        CareHubError, match=r"the Hub failed for 'lab/tiny' with status 503 .*try again later"
    ):
        push_folder(export, "lab/tiny")
    server.faults = {}
    push_folder(export, "lab/tiny")


def test_a_download_that_is_cut_is_resumed(server, export, tmp_path):
    push_folder(export, "lab/tiny")
    server.faults = {"GET /lab/tiny/resolve": ["cut", "cut"]}
    loaded = care_hub.load_encoder("lab/tiny", cache_dir=tmp_path / "cache")
    np.testing.assert_allclose(loaded.encode(IMAGES), care_hub.load_encoder(export).encode(IMAGES), atol=1e-6)
    assert not server.faults["GET /lab/tiny/resolve"]


def test_what_only_reads_is_left_to_the_client(server, export, tmp_path):
    """It was tried three times, and by the client several times each."""
    push_folder(export, "lab/tiny")
    server.requests.clear()
    server.faults = {"whoami": [503], "GET /lab/tiny/resolve": [503]}
    with pytest.raises(CareHubError, match="status 503"):
        check_push("lab/new")
    with pytest.raises(CareHubError, match="status 503"):
        care_hub.load_encoder("lab/tiny", cache_dir=tmp_path / "cache")
    assert server.requests["GET /api/whoami-v2"] == 1
    assert care_hub.load_encoder("lab/tiny", cache_dir=tmp_path / "cache")  # goes on with what has come
    fetched = [count for name, count in server.requests.items() if name.startswith("GET /lab/tiny/resolve")]
    assert sorted(fetched) == [1, 1, 1, 1, 2]


@pytest.mark.skipif("write" not in signature(HfApi.auth_check).parameters, reason="an old client")
def test_whether_a_token_may_push_is_what_the_hub_says_of_the_repository(server, export):
    push_folder(export, "lab/tiny")
    server.requests.clear()
    check_push("lab/tiny")
    assert list(server.requests) == ["GET /api/models/lab/tiny/auth-check/write"]
    with pytest.raises(CareHubError, match="your Hub token may not write to 'lab/tiny'"):
        check_push("lab/tiny", READER)


@pytest.fixture
def silent_port():
    """A port of loopback that takes no connection and refuses none: its queue is full."""
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        yield server.getsockname()[1]


@pytest.mark.parametrize("refuses", [True, False])
def test_where_no_hub_can_be_reached_reads_end_at_once(
    refuses, silent_port, server, export, tmp_path, monkeypatch, capfd
):
    """`care-hub list --hub` took 70 seconds, and had 33 lines from the client before its sentence."""
    push_folder(export, "lab/tiny")
    care_hub.load_encoder("lab/tiny", cache_dir=tmp_path / "cache")
    capfd.readouterr()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{9 if refuses else silent_port}")
    monkeypatch.setattr(client, "CONNECT_SECONDS", 0.3)
    start = time.monotonic()
    done = CliRunner().invoke(cli.main, ["list", "--hub"])
    assert done.output.startswith("Error: The Hub can't be reached for 'the list of models' (")
    assert ("Connection refused" if refuses else "timed out") in done.output
    with pytest.raises(CareHubError, match="can't be reached for 'lab/tiny'"):
        check_push("lab/tiny")
    assert care_hub.load_encoder("lab/tiny", cache_dir=tmp_path / "cache")  # what is in the cache will do
    assert time.monotonic() - start < 5
    assert done.exit_code == 1 and done.output.count("\n") == 1 and capfd.readouterr().err == ""


def test_a_download_that_never_ends_well_leaves_no_model(server, export, tmp_path):
    push_folder(export, "lab/tiny")
    server.faults = {"GET /lab/tiny/resolve": [500] * 100}
    with pytest.raises(CareHubError, match="lab/tiny"):
        care_hub.load_encoder("lab/tiny", cache_dir=tmp_path / "cache")
    server.faults = {}
    with pytest.raises(CareHubError, match="not whole in the cache"):
        care_hub.load_encoder("lab/tiny", cache_dir=tmp_path / "cache", local_files_only=True)
    assert care_hub.load_encoder("lab/tiny", cache_dir=tmp_path / "cache")


def test_an_unreachable_hub_is_one_sentence(export, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(client, "RETRY_SECONDS", (0,))
    with pytest.raises(CareHubError, match="can't be reached"):
        care_hub.load_encoder("lab/tiny", cache_dir=tmp_path / "cache")
    with pytest.raises(CareHubError, match="try again later"):
        push_folder(export, "lab/tiny", token=WRITER)


def test_file_names_can_not_leave_the_cache(server, export, tmp_path):
    names = [
        "../../escaped.safetensors",
        "linear_head.x/../../../../escaped.safetensors",
        "linear_head./etc/x.safetensors",
    ]
    server.put("lab/evil", edited(export, lambda config: None) | dict.fromkeys(names, b"x"))
    cache = tmp_path / "deep" / "cache"
    care_hub.load_encoder("lab/evil", cache_dir=cache)
    assert [p for p in tmp_path.rglob("*escaped*")] == [] and not (cache / "etc").exists()
    snapshot = next(cache.rglob("config.json")).parent
    expected = {
        "config.json",
        "model.safetensors",
        "projection.safetensors",
        "linear_head.shapes.safetensors",
        "README.md",
    }
    assert {p.name for p in snapshot.iterdir()} == expected


def test_tokens_appear_nowhere(server, export):
    server.faults = {"repos/create": [403]}

    def leak():
        raise ValueError(f"Bearer {WRITER} was refused")

    with pytest.raises(CareHubError, match="may not write") as refused:
        push_folder(export, "lab/tiny", token=WRITER)
    with pytest.raises(CareHubError, match=r"Bearer \*\*\* was refused") as leaked:
        ask(leak, "lab/tiny", WRITER)
    assert WRITER not in f"{refused.value}{leaked.value}"
    push_folder(export, "lab/tiny", token=WRITER)
    assert all(WRITER.encode() not in content for content in stored(server, "lab/tiny").values())


@pytest.fixture
def debugged(caplog, monkeypatch):
    """All that the Hub's client and those below it can log is logged; no pause takes time."""
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    before = hub_logging.get_verbosity()
    caplog.set_level(logging.DEBUG)
    hub_logging.set_verbosity_debug()
    hub_logging.enable_propagation()
    yield caplog
    hub_logging.set_verbosity(before)
    hub_logging.disable_propagation()


@pytest.mark.parametrize("fault", [None, 401, 403, 404, 429, 500, "cut", "lost", "hang"])
def test_no_answer_makes_a_token_appear(fault, server, export, tmp_path, monkeypatch, debugged, capfd):
    """Not in files, errors, output or logs, although this Hub sends it back with each failure."""
    push_folder(export, "lab/tiny")
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.2)
    server.faults = {"": [fault] * 10_000} if fault else {}
    calls = {
        "load": lambda: care_hub.load_encoder("lab/tiny", token=WRITER, cache_dir=tmp_path / "cache"),
        "push": lambda: push_folder(export, "lab/tiny", token=WRITER, revision="other"),
        "check": lambda: check_push("lab/tiny", WRITER),
        "list": lambda: care_hub.list_models(hub=True),
    }
    told = []
    for call in calls.values():
        try:
            call()
        except CareHubError as error:
            told.append(str(error))
    told.append(CliRunner().invoke(cli.main, ["info", "lab/tiny"]).output)
    assert len(told) == (5 if fault else 1) or fault == "cut"
    said = "".join([*told, *capfd.readouterr(), debugged.text])
    assert "lab/tiny" in said and WRITER not in said
    for root in (tmp_path, Path(os.environ["HF_HOME"])):
        for path in filter(Path.is_file, root.rglob("*")):
            assert WRITER.encode() not in path.read_bytes()


HANGS = ["GET /api/models", "HEAD", "resolve", "repos/create", "preupload", "whoami"]
BODIES = ["GET /api/models", "GET /lab/tiny/resolve", "preupload", "whoami"]  # answers with a body


@pytest.mark.parametrize(
    ("word", "fault"),
    [(w, fault) for fault, words in (("hang", HANGS), ("drip", BODIES), ("stall", BODIES)) for w in words],
)
def test_a_hub_that_hangs_or_drips_is_not_waited_for(word, fault, server, export, tmp_path, monkeypatch):
    """Some answers were waited for without end, others for minutes."""
    push_folder(export, "lab/tiny")
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.3)
    server.faults = {word: [fault] * 100}
    (export / "README.md").write_text("new")
    start = time.monotonic()
    with pytest.raises(CareHubError, match=r"reached|try again later"):
        check_push("lab/new", WRITER)  # of which only `whoami` can tell
        push_folder(export, "lab/tiny")
        care_hub.load_encoder("lab/tiny", cache_dir=tmp_path / "cache")
    assert time.monotonic() - start < 5


def test_a_hub_does_not_say_how_long_is_waited(server, export, monkeypatch):
    """huggingface_hub sleeps as long as `Retry-After` asks, be it a day."""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.faults = {"lfs/objects": [429] * 100}
    with pytest.raises(CareHubError, match="with status 429"):
        push_folder(export, "lab/tiny")
    assert max(pauses) < 10


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "lab/..", "lab/a b", "/x"])
def test_names_that_no_repository_can_have_are_refused(name):
    with pytest.raises(CareHubError, match=f"'{name}' is not a name for a Hub repository"):
        check_name(name)


def test_waits_between_attempts_and_gives_up(monkeypatch):
    pauses, calls = [], []
    monkeypatch.setattr(client.time, "sleep", pauses.append)

    def fail():
        calls.append(1)
        raise ConnectionError("reset")

    with pytest.raises(CareHubError, match=r"the Hub failed for 'lab/x' \(reset\); try again later"):
        ask(fail, "lab/x", None)
    assert pauses == [1, 3] and len(calls) == 3

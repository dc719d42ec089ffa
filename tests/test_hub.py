"""What leaves for the Hub comes back the same, or not at all. The Hub is on loopback; the client is the real one."""

import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, TINY, metrics, refusal, run, train_here
from huggingface_hub import ModelCard
from loopback_hub import READER, WRITER, LoopbackHub
from PIL import Image
from safetensors.torch import load_file, save

import care_hub
from care_hub import card, cli, hub
from care_hub.classifier import LinearHead
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.evaluate import record


@pytest.fixture
def server(monkeypatch):
    with LoopbackHub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setattr(hub, "RETRY_SECONDS", (0, 0))
        yield running


@pytest.fixture
def export(tmp_path):
    """An export of random weights with a head and a card, much as training leaves it."""
    torch.manual_seed(0)
    encoder = Encoder.new("resnet10_w16_small", hidden=32, outputs=16)
    results = {"knn_top1": 50.0, "knn_color_top1": 40.0, "rotation_error": 0.1, "invariance_error": 0.2, "gram_deviation": 0.01}
    encoder.care |= {"method": "CARE-simclr", "weight": 0.3, "dataset": "shapes", "results": results | {"rotation_invariance_ratio": 0.5}}
    encoder.care |= {"training": {"model": "resnet10_w16_small", "epochs": 2}, "versions": {"torch": torch.__version__}}
    folder = encoder.save_pretrained(tmp_path / "export")
    names = [f"class {k}" for k in range(10)]
    LinearHead("shapes", torch.randn(10, 128), torch.randn(10), names, {"top1": 61.5, "top5": 97.0, "n_train": 5000, "n_test": 2000}).save(
        folder
    )
    card.write(folder)
    return folder


def files(server, repo_id, revision="main"):
    return server.repositories[repo_id].files(revision)[1]


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


PHOTO = Image.radial_gradient("L").convert("RGB")  # the one in the card
PICTURES = np.random.RandomState(0).randint(0, 256, (3, 32, 32, 3)).astype(np.uint8)


def test_pushed_and_loaded_in_a_fresh_process_with_a_fresh_cache_it_is_the_same(server, export, tmp_path):
    url = hub.push(export, "lab/tiny", private=True)
    assert url.startswith(f"{server.url}/lab/tiny/commit/")
    stored = files(server, "lab/tiny")
    for name in ("config.json", "model.safetensors", "projection.safetensors", "linear_head.shapes.safetensors"):
        assert stored[name] == (export / name).read_bytes()
    np.save(tmp_path / "pictures.npy", PICTURES)
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    load = "import sys, numpy as np, care_hub; e = care_hub.load_encoder('lab/tiny'); x = np.load(sys.argv[1])\n"
    load += "np.savez(sys.argv[2], z=e.encode(x), h=e.encode(x, space='backbone'))\n"
    load += "print(care_hub.load_classifier('lab/tiny').classify(x).labels)"
    plain = "import sys, numpy; sys.modules['care_hub'] = None\n" + snippets(stored["README.md"].decode())[1]
    plain += "\nnumpy.save(sys.argv[1], features.numpy())"
    run("python", "-c", load, tmp_path / "pictures.npy", tmp_path / "care.npz", env=environment)
    run("python", "-c", plain, tmp_path / "timm.npy", env=environment)
    encoder, found = care_hub.load_encoder(export), np.load(tmp_path / "care.npz")
    np.testing.assert_array_equal(found["z"], encoder.encode(PICTURES))
    np.testing.assert_allclose(np.load(tmp_path / "timm.npy"), encoder.encode(PHOTO, space="backbone"), atol=1e-5)
    asked = sum(server.requests.values())
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    labels = run("python", "-c", load, tmp_path / "pictures.npy", tmp_path / "again.npz", env=offline).stdout
    np.testing.assert_array_equal(np.load(tmp_path / "again.npz")["z"], found["z"])
    assert "class" in labels and sum(server.requests.values()) == asked


def test_evaluations_travel_with_the_encoder(server, export):
    record.add(export, "accuracy", "shapes", {"linear probe, 1 % of the labels": {"top1": 12.5, "n_train": 50}})
    hub.push(export, "lab/tiny")
    assert record.read(hub.fetch("lab/tiny")) == record.read(export) != {}
    told = json.loads(CliRunner().invoke(cli.main, ["info", "lab/tiny"]).stdout)
    assert told["accuracy"]["shapes"]["linear probe, 1 % of the labels"]["top1"] == 12.5
    assert "12.50" in files(server, "lab/tiny")["README.md"].decode()


def test_revisions_private_repositories_and_pull_requests(server, export, tmp_path, monkeypatch):
    hub.push(export, "alice/secret", private=True)
    other = Encoder.new("resnet10_w16_small", hidden=32, outputs=16)
    other.push_to_hub("alice/secret", revision="v2", commit_message="second")
    for revision, expected in (("main", care_hub.load_encoder(export)), ("v2", other)):
        loaded = care_hub.load_encoder("alice/secret", revision=revision, cache_dir=tmp_path / "cache")
        np.testing.assert_allclose(loaded.encode(PICTURES), expected.encode(PICTURES), atol=1e-6)
    assert hub.push(export, "alice/secret", create_pr=True).endswith("/discussions/1")
    with pytest.raises(CareHubError, match="'alice/secret' has no revision 'v3'"):
        care_hub.load_encoder("alice/secret", revision="v3", cache_dir=tmp_path / "cache")
    monkeypatch.setenv("HF_TOKEN", READER)
    for token in (READER, None):
        with pytest.raises(CareHubError, match="no repository 'alice/secret' on the Hub that you may see"):
            care_hub.load_encoder("alice/secret", token=token, cache_dir=tmp_path / "other")
    assert care_hub.load_encoder("alice/secret", token=WRITER, cache_dir=tmp_path / "other")


def test_an_unchanged_push_changes_nothing_and_a_broken_one_is_finished_by_pushing_again(server, export):
    server.faults = {"PUT /lfs": [503], "/preupload/": [500], "POST /api/models/lab/tiny/commit": [429, "lost"], "repos/create": [503]}
    hub.push(export, "lab/tiny")
    assert not any(server.faults.values())  # all of them happened
    count = len(server.repositories["lab/tiny"].commits)
    hub.push(export, "lab/tiny")
    assert len(server.repositories["lab/tiny"].commits) == count
    assert files(server, "lab/tiny")["model.safetensors"] == (export / "model.safetensors").read_bytes()


def test_a_hub_that_stays_broken_is_one_sentence(server, export):
    server.faults = {"/commit/": [503] * 20}
    with pytest.raises(CareHubError, match=r"the Hub failed for 'lab/tiny' with status 503 .*try again later"):
        hub.push(export, "lab/tiny")
    server.faults = {}
    hub.push(export, "lab/tiny")


@pytest.mark.parametrize("fault", ["cut", 503, 429])
def test_a_broken_download_is_taken_up_again(fault, server, export, tmp_path):
    hub.push(export, "lab/tiny")
    server.faults = {"GET /lab/tiny/resolve": [fault, fault], "/tree/": [fault] if fault != "cut" else []}
    loaded = care_hub.load_encoder("lab/tiny", cache_dir=tmp_path / "cache")
    np.testing.assert_allclose(loaded.encode(PICTURES), care_hub.load_encoder(export).encode(PICTURES), atol=1e-6)
    assert not server.faults["GET /lab/tiny/resolve"]


def test_a_download_that_never_ends_well_leaves_no_model(server, export, tmp_path):
    hub.push(export, "lab/tiny")
    server.faults = {"GET /lab/tiny/resolve": [500] * 100}
    with pytest.raises(CareHubError, match="lab/tiny"):
        care_hub.load_encoder("lab/tiny", cache_dir=tmp_path / "cache")
    server.faults = {}
    with pytest.raises(CareHubError, match="not whole in the cache"):
        care_hub.load_encoder("lab/tiny", cache_dir=tmp_path / "cache", local_files_only=True)
    assert care_hub.load_encoder("lab/tiny", cache_dir=tmp_path / "cache")


def test_an_unreachable_hub_is_one_sentence(export, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "RETRY_SECONDS", (0,))
    with pytest.raises(CareHubError, match="can't be reached"):
        care_hub.load_encoder("lab/tiny", cache_dir=tmp_path / "cache")
    with pytest.raises(CareHubError, match="try again later"):
        hub.push(export, "lab/tiny", token=WRITER)


def whole(export) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in export.iterdir()}


def edited(export, change) -> dict[str, bytes]:
    """The export's files with config.json changed, its sums left alone."""
    content = whole(export)
    config = json.loads(content["config.json"])
    change(config)
    return content | {"config.json": json.dumps(config).encode()}


def with_weights(export, name, change) -> dict[str, bytes]:
    """The export's files with one tensor file changed, its sum in config.json made to fit."""
    import hashlib

    data = save(change(load_file(export / name)), metadata={"format": "pt"})
    return edited(export, lambda c: c["care"]["sha256"].update({name: hashlib.sha256(data).hexdigest()})) | {name: data}


HOSTILE = {
    "pickled weights only": (
        lambda e: {"config.json": (e / "config.json").read_bytes(), "pytorch_model.bin": b"\x80\x02"}, "holds no care_hub encoder"
    ),
    "absurd picture size": (lambda e: edited(e, lambda c: c["care"].update(image_size=10**6)), "not a care_hub configuration"),
    "a crop that asks for a huge picture": (
        lambda e: edited(e, lambda c: [c[k].update(crop_pct=1e-6) for k in ("care", "pretrained_cfg")]), "not a care_hub configuration"
    ),
    "division by nothing": (
        lambda e: edited(e, lambda c: [c[k].update(std=[0, 0, 0]) for k in ("care", "pretrained_cfg")]), "not a care_hub configuration"
    ),
    "absurd head": (lambda e: edited(e, lambda c: c["care"]["projection"].update(hidden=10**12)), "disagree on the head"),
    "another architecture": (lambda e: edited(e, lambda c: c.update(architecture="resnet50")), "contradicts itself"),
    "other timm arguments": (lambda e: edited(e, lambda c: c["model_args"].update(channels=[10**6] * 4)), "contradicts itself"),
    "unknown model": (lambda e: edited(e, lambda c: c["care"].update(model="hf-hub:evil/x")), "there is no model 'hf-hub:evil/x'"),
    "other weights": (lambda e: whole(e) | {"model.safetensors": save({"a": torch.ones(1)})}, "sha256"),
    "weights cut short": (lambda e: whole(e) | {"projection.safetensors": b"\x08\x00"}, "sha256"),
    "no sums, weights cut short": (
        lambda e: edited(e, lambda c: c["care"].pop("sha256")) | {"model.safetensors": (e / "model.safetensors").read_bytes()[:5000]},
        "not a complete safetensors file",
    ),
    "tensors of another shape": (
        lambda e: with_weights(e, "model.safetensors", lambda t: t | {"layer1.0.conv1.weight": torch.ones(1, 1, 3, 3)}), "should be"
    ),
    "a tensor missing": (
        lambda e: with_weights(e, "model.safetensors", lambda t: {k: v for k, v in t.items() if k != "bn1.bias"}), "bn1.bias should be"
    ),
    "not a number": (
        lambda e: with_weights(e, "model.safetensors", lambda t: t | {"bn1.bias": t["bn1.bias"] * float("nan")}), "not finite"
    ),
    "HTML instead of JSON": (lambda e: edited(e, lambda c: None) | {"config.json": b"<html>busy</html>"}, "not a care_hub configuration"),
    "a number instead of an object": (lambda e: edited(e, lambda c: None) | {"config.json": b"7"}, "not a care_hub configuration"),
    "endless configuration": (lambda e: edited(e, lambda c: c.update(x="x" * (2 << 20))), "not a care_hub configuration"),
    "deep configuration": (lambda e: edited(e, lambda c: None) | {"config.json": b"[" * 500_000}, "not a care_hub configuration"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_repository_is_refused(kind, server, export, tmp_path):
    make, sentence = HOSTILE[kind]
    server.put("lab/evil", make(export))
    with pytest.raises(CareHubError, match=re.escape(sentence)):
        care_hub.load_encoder("lab/evil", cache_dir=tmp_path / "cache")


def test_file_names_can_not_leave_the_cache(server, export, tmp_path):
    names = ["../../escaped.safetensors", "linear_head.x/../../../../escaped.safetensors", "linear_head./etc/x.safetensors"]
    server.put("lab/evil", edited(export, lambda c: None) | dict.fromkeys(names, b"x"))
    cache = tmp_path / "deep" / "cache"
    care_hub.load_encoder("lab/evil", cache_dir=cache)
    assert [p for p in tmp_path.rglob("*escaped*")] == [] and not (tmp_path / "deep" / "cache" / "etc").exists()
    snapshot = next(cache.rglob("config.json")).parent
    expected = {"config.json", "model.safetensors", "projection.safetensors", "linear_head.shapes.safetensors"}
    assert {p.name for p in snapshot.iterdir()} == expected


def test_a_head_of_other_weights_or_of_nonsense_is_refused(export, tmp_path):
    head = LinearHead.load(export / "linear_head.shapes.safetensors")
    head.encoder = "0" * 64
    head.save(export)
    with pytest.raises(CareHubError, match="trained on other weights"):
        care_hub.load_linear_head(export, dataset="shapes")
    LinearHead("narrow", torch.ones(2, 7), torch.ones(2), ["a", "b"], {}).save(export)
    with pytest.raises(CareHubError, match="does not take the 128 features"):
        care_hub.load_classifier(export, dataset="narrow")
    with pytest.raises(CareHubError, match="no linear head for 'cifar10'; it has: narrow, shapes"):
        care_hub.load_linear_head(export, dataset="cifar10")
    (export / "linear_head.narrow.safetensors").write_bytes(b"junk")
    with pytest.raises(CareHubError, match="narrow"):
        care_hub.load_linear_head(export, dataset="narrow")


def test_a_readme_of_absurd_size_is_not_swallowed(server, export):
    server.put("lab/huge", {"README.md": b"x" * (50 << 20)})
    with pytest.raises(CareHubError, match="README of 'lab/huge' has 50 MB"):
        hub.push(export, "lab/huge")


def test_what_a_person_wrote_into_the_card_survives(server, export):
    theirs = "---\nlicense: apache-2.0\nlanguage: en\ntags:\n- birds\n---\n\n# Birds\n\nAsk Ann before use.\n"
    server.put("lab/birds", {"README.md": theirs.encode()})
    hub.push(export, "lab/birds")
    first = files(server, "lab/birds")["README.md"].decode()
    assert "Ask Ann before use." in first and card.BEGIN in first
    changed = first.replace(card.END, card.END + "\n\n## Field notes\n\nSeen in May.")
    server.repositories["lab/birds"].commit("main", files(server, "lab/birds") | {"README.md": changed.encode()})
    hub.push(export, "lab/birds")
    last = files(server, "lab/birds")["README.md"].decode()
    assert last.count(card.BEGIN) == 1 and last.count("Seen in May.") == 1 and last.count("Ask Ann") == 1
    data = ModelCard(last).data
    assert data.language == "en" and {"birds", "care_hub"} <= set(data.tags)
    assert data.license == "apache-2.0"  # a person's choice
    assert {r.metric_name: r.metric_value for r in data.eval_results}["linear probe top-1 (backbone)"] == 61.5


def test_what_a_person_wrote_into_the_local_card_survives_a_push_over_an_older_one(server, export):
    hub.push(export, "lab/birds")
    readme = export / "README.md"
    readme.write_text(readme.read_text() + "\n## At home\n\nMind the cat.\n")
    online = files(server, "lab/birds")["README.md"].decode() + "\n## Online\n\nMind the dog.\n"
    server.repositories["lab/birds"].commit("main", files(server, "lab/birds") | {"README.md": online.encode()})
    for _ in range(2):
        hub.push(export, "lab/birds")
        text = files(server, "lab/birds")["README.md"].decode()
        assert text == readme.read_text()
        assert text.count("Mind the cat.") == text.count("Mind the dog.") == text.count(card.BEGIN) == 1


def test_a_card_with_broken_metadata_keeps_its_text(export):
    (export / "README.md").write_text("---\ntags: [a\n---\n\nAsk Ann before use.\n")
    text = card.write(export).read_text()
    assert "Ask Ann before use." in text and ModelCard(text).data.library_name == "care_hub"


def test_the_card_says_what_the_hub_can_read(server, export):
    hub.push(export, "lab/tiny")
    data = ModelCard(files(server, "lab/tiny")["README.md"].decode()).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("care_hub", "image-feature-extraction", "mit")
    values = {r.metric_name: r.metric_value for r in data.eval_results}
    assert values["linear probe top-1 (backbone)"] == 61.5 and values["kNN top-1 (backbone)"] == 50.0
    assert care_hub.list_models(hub=True) == ["lab/tiny"] and care_hub.list_models(hub=True, author="bob") == []
    done = CliRunner().invoke(cli.main, ["list", "--hub", "--author", "lab"])
    assert done.exit_code == 0 and done.output.strip() == "lab/tiny"


def test_snippets_of_the_card_run_as_they_stand(server, export, tmp_path, monkeypatch):
    """In plain timm, from the Hub: above, where care_hub can't be imported."""
    encoder = care_hub.load_encoder(export)
    z, h = encoder.encode(PHOTO), encoder.encode(PHOTO, space="backbone")
    local = (export / "README.md").read_text()
    hub.push(export, "lab/tiny")
    for text in (files(server, "lab/tiny")["README.md"].decode(), local):
        names = {}
        exec(snippets(text)[0], names)
        np.testing.assert_allclose(names["z"], z, atol=1e-5)
        np.testing.assert_allclose(names["h"], h, atol=1e-5)
        assert names["labels"][0].startswith("class ") and names["probabilities"].shape == (1, 10)
    exec(snippets(local)[1], names)
    np.testing.assert_allclose(names["features"], h, atol=1e-5 * np.abs(h).max())


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
    config = json.loads(files(server, "lab/new")["config.json"])
    assert str(tmp_path) not in json.dumps(config) + files(server, "lab/new")["README.md"].decode()


def test_tokens_appear_nowhere(server, export, tmp_path, monkeypatch):
    server.faults = {"repos/create": [403]}
    said = []
    for call in (lambda: hub.push(export, "lab/tiny", token=WRITER), lambda: hub._ask(_leak, "lab/tiny", WRITER)):
        with pytest.raises(CareHubError) as error:
            call()
        said.append(str(error.value))
    assert "may not write" in said[0] and "***" in said[1] and WRITER not in "".join(said)
    hub.push(export, "lab/tiny", token=WRITER)
    assert all(WRITER.encode() not in content for content in files(server, "lab/tiny").values())


def _leak():
    raise ValueError(f"Bearer {WRITER} was refused")


def test_the_load_path_can_not_unpickle():
    """No torch.load, pickle or strict=False anywhere but in the converter of foreign checkpoints."""
    for path in (ROOT / "care_hub").rglob("*.py"):
        text = path.read_text()
        assert "strict=False" not in text and "allow_pickle=True" not in text
        if path.name != "convert.py":
            assert "torch.load" not in text and "pickle" not in re.sub(r"unpickled|Pickled weights|allow_pickle=False", "", text), path


def test_info_and_classify(export, photos, tmp_path):
    done = CliRunner().invoke(cli.main, ["info", str(export)])
    about = json.loads(done.output)
    assert about["linear_heads"]["shapes"]["top1"] == 61.5 and about["model"] == "resnet10_w16_small"
    done = CliRunner().invoke(cli.main, ["classify", str(photos / "test"), "--encoder", str(export)])
    rows = [line.split("\t") for line in done.output.strip().splitlines()]
    assert len(rows) == 16 and all(label.startswith("class ") and 0.1 <= float(p) <= 1 for _, label, p in rows)
    labels, probabilities = care_hub.load_classifier(export).classify(photos / "test")
    assert labels == [r[1] for r in rows]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    refused = CliRunner().invoke(cli.main, ["info", str(tmp_path / "absent")])
    assert refused.exit_code == 1 and "is not a folder" in refused.output

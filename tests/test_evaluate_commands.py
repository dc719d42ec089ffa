"""eval_linear.py, `care-hub knn` and `care-hub equivariance`: what they print, save and refuse."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from click.testing import CliRunner
from helpers import ROOT, care_hub_command, eval_linear, run_forked, visible
from huggingface_hub import ModelCard

import care_hub
from care_hub import cli
from care_hub.config import DataConfig, EvalConfig
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.evaluate import commands
from care_hub.evaluate.equivariance import FAMILIES
from care_hub.hub.evaluation_record import read_record
from care_hub.metrics import knn_top1

pytestmark = pytest.mark.launches


@pytest.fixture
def encoder(tiny_run, tmp_path):
    """A run folder of this test's own."""
    return shutil.copytree(tiny_run, tmp_path / "tiny")


def on(photos, *more) -> list[str]:
    return [str(word) for word in ("--dataset-name", "imagefolder", "--data-root", photos, *more)]


def refusal(encoder, *words) -> str:
    """What eval_linear.py says instead of working."""
    return eval_linear(encoder, *words, ok=False)


def card_values(folder) -> dict[str, float]:
    rows = ModelCard.load(folder / "README.md").data.eval_results
    return {row.metric_name: row.metric_value for row in rows}


def without_seconds(result: dict) -> dict:
    return {k: v for k, v in result.items() if "seconds" not in k}


def test_eval_linear_saves_head_card_and_result(encoder):
    weights = (encoder / "export" / "model.safetensors").read_bytes()
    result = eval_linear(encoder, "--dataset-name", "shapes")
    assert result["encoder"] == str(encoder) and result["dataset"] == "shapes"
    assert (result["n_train"], result["n_test"]) == (5000, 2000)
    assert 10 < result["top1"] < result["top5"] < 100
    assert (encoder / "export" / "model.safetensors").read_bytes() == weights
    head = care_hub.load_linear_head(encoder, dataset="shapes")
    assert head.metrics["top1"] == result["top1"] and head.class_names[0] == "circle"
    assert card_values(encoder / "export")["linear probe top-1 (backbone)"] == result["top1"]


class Terminal(io.StringIO):
    """Something to write to that shows progress bars."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("protocol", ["lbfgs", "sgd"])
def test_a_probe_shows_how_far_it_is_and_where_its_head_is(encoder, photos, monkeypatch, caplog, protocol):
    monkeypatch.setattr("sys.stderr", shown := Terminal())
    caplog.set_level("INFO", "care_hub")
    data = {"dataset_name": "imagefolder", "data_root": photos, "protocol": protocol, "epochs": 2}
    commands.evaluate(EvalConfig(**data, encoder=encoder))
    last = "penalties" if protocol == "lbfgs" else "linear head"
    assert all(f"{title}: " in shown.getvalue() for title in ("training images", "test images", last))
    assert str(encoder / "export" / f"linear_head.{photos.name}.safetensors") in caplog.text
    commands.evaluate(EvalConfig(**data, encoder=encoder, label_fraction=0.5))
    assert "a head of a part of the labels is not saved" in caplog.text


def test_two_processes_get_what_one_gets(encoder, photos):
    one = eval_linear(encoder, *on(photos))
    done = run_forked(ROOT / "eval_linear.py", "--encoder", encoder, *on(photos), processes=2)
    two = json.loads(done.stdout.strip().splitlines()[-1])
    assert done.stdout.count('"top1"') == 1
    assert without_seconds(two) == without_seconds(one)


def test_the_published_schedule_also_on_augmented_features(encoder, photos):
    words = on(photos, "--protocol", "sgd", "--augmented-copies", 2, "--seeds", 2)
    for optimizer in ("adam", "sgd"):
        result = eval_linear(encoder, *words, "--optimizer", optimizer)
        assert result["seeds"] == 2 and result["top1"] > 60 and result["top1_std"] >= 0
    assert card_values(encoder / "export")["linear probe (sgd) top-1 (backbone)"] == result["top1"]


def test_few_labels_are_sampled_from_each_class_and_leave_the_head_alone(encoder, photos, monkeypatch):
    eval_linear(encoder, *on(photos))
    head = encoder / "export" / f"linear_head.{photos.name}.safetensors"
    before, embed, embedded = head.read_bytes(), Encoder.embed, []
    monkeypatch.setattr(
        Encoder, "embed", lambda self, x, *options: embedded.append(len(x)) or embed(self, x, *options)
    )
    result = eval_linear(encoder, *on(photos, "--label-fraction", 0.1, "--seeds", 3))
    assert result["n_train"] == 4  # two of 24 in each of two classes
    assert sum(embedded) <= 3 * 4 + 16  # and the test images
    assert head.read_bytes() == before
    known = read_record(encoder / "export")["accuracy"][photos.name]
    assert set(known) == {"linear probe", "linear probe, 10 % of the labels"}


def test_fine_tuning_makes_another_encoder_with_its_head(encoder, photos, tmp_path):
    before = (encoder / "export" / "model.safetensors").read_bytes()
    assert "--output-dir" in refusal(encoder, *on(photos, "--protocol", "finetune"))
    words = on(photos, "--protocol", "finetune", "--output-dir")
    result = eval_linear(encoder, *words, tmp_path / "tuned", "--epochs", 20)
    for taken in (tmp_path / "tuned", encoder / "export"):
        assert "already contains an encoder" in refusal(encoder, *words, taken)
    assert "already contains an encoder" in refusal(encoder, *on(photos, "--output-dir", tmp_path / "tuned"))
    assert (encoder / "export" / "model.safetensors").read_bytes() == before
    tuned = care_hub.load_encoder(tmp_path / "tuned")
    assert tuned.projection is None and tuned.config.finetuned == photos.name
    assert tuned.fingerprint != care_hub.load_encoder(encoder).fingerprint
    labels, _ = care_hub.load_classifier(tmp_path / "tuned", dataset=photos.name).classify(photos / "test")
    right = sum(label == ("cold" if k < 8 else "warm") for k, label in enumerate(labels))
    assert 100 * right / 16 == result["top1"] > 85
    assert f"fine-tuned with the labels of `{photos.name}`" in (tmp_path / "tuned" / "README.md").read_text()


def test_a_head_is_saved_where_the_user_says(photos, tmp_path):
    name = "resnet10_w16_small.care_shapes"
    result = eval_linear(name, *on(photos, "--output-dir", tmp_path / "o"))
    assert (result["n_train"], result["n_test"], result["top5"]) == (48, 16, 100)
    classifier = care_hub.load_classifier(tmp_path / "o", dataset=photos.name)
    labels, probabilities = classifier.classify(photos / "test")
    right = sum(label == ("cold" if k < 8 else "warm") for k, label in enumerate(labels))
    assert 100 * right / 16 == result["top1"] and probabilities.shape == (16, 2)


def test_what_was_measured_is_pushed_and_the_result_still_comes_last(encoder, photos, monkeypatch):
    pushed = []

    def push(folder, repo_id) -> str:
        pushed.append((folder, repo_id, set(read_record(folder)["accuracy"][photos.name])))
        return "https://hub/org/name/commit/1"

    monkeypatch.setattr(commands, "check_push", lambda repo_id: pushed.append(repo_id))
    monkeypatch.setattr(commands, "push_export", push)
    words = ["--encoder", str(encoder), *on(photos, "--push-to-hub", "org/name")]
    *before, last = CliRunner().invoke(cli.eval_linear, words).stdout.splitlines()
    assert pushed == ["org/name", (encoder / "export", "org/name", {"linear probe"})]
    assert "https://hub/org/name/commit/1" in before and "top1" in json.loads(last)


def test_a_place_that_can_not_be_written_is_refused_before_the_work(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(commands, "linear_probe", lambda *_: pytest.fail("the probe was trained"))
    words = ("--dataset-name", "shapes", "--output-dir", tmp_path / "file" / "o")
    assert "can't be written" in refusal(tiny_run, *words)


@pytest.mark.parametrize(
    ("encoder_name", "words", "sentence"),
    [
        ("resnet10_w16_small", ["--dataset-name", "shapes"], "--output-dir"),
        ("absent", ["--dataset-name", "shapes"], "not in the registry"),
        ("{tiny}", ["--dataset-name", "shape"], "did you mean 'shapes'"),
        ("{tiny}", ["--dataset-name", "imagefolder"], "needs --data-root"),
        ("{tiny}", ["--dataset-name", "shapes", "--label-fraction", "2"], "--label-fraction"),
        ("{tiny}", ["--dataset-name", "shapes", "--augmented-copies", "2"], "--augmented-copies"),
    ],
)
def test_user_errors_end_in_one_sentence(encoder_name, words, sentence, tiny_run):
    assert sentence in refusal(encoder_name.format(tiny=tiny_run), *words)


def test_knn_from_the_command_line_is_shown_in_the_card(encoder, photos):
    def knn(*words) -> dict:
        done = CliRunner().invoke(cli.main, ["knn", str(encoder), *on(photos, *words)])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout.splitlines()[-1])

    result = knn()
    loaded = care_hub.load_encoder(encoder)
    bank, queries = (
        torch.from_numpy(loaded.encode(photos / split, space="backbone")) for split in ("train", "test")
    )
    labels, truth = torch.arange(48) // 24, torch.arange(16) // 8  # sorted: cold, then warm
    assert result["top1"] == pytest.approx(knn_top1(bank, labels, queries, truth), abs=0.01)
    assert result["n_train"] == 48 and result["top1"] > 85
    assert card_values(encoder / "export")["kNN top-1 (backbone)"] == result["top1"]
    row = f"| {photos.name} | kNN top-1 (backbone) | {result['top1']:.2f} |"
    assert row in (encoder / "export" / "README.md").read_text()
    assert knn("--bank", "10")["n_train"] == 10


def test_encoders_side_by_side(encoder, photos, tmp_path):
    twin = shutil.copytree(encoder, tmp_path / "twin")
    words = on(photos, "--draws", 2, "-o", tmp_path / "o")
    output = care_hub_command("equivariance", encoder, twin, *words)
    both = json.loads((tmp_path / "o" / "equivariance.json").read_text())["encoders"]
    first, second = both.values()
    assert first == second and list(both) == [str(encoder), str(twin)]  # the same weights and images
    assert list(first["families"]) == list(FAMILIES)
    assert set(first["attributes"]) == {"projection", "backbone"}
    attributes = {"label", "brightness", "contrast", "saturation", "hue"}
    assert set(first["attributes"]["backbone"]) == attributes
    for metric, (mean, low, high) in first["families"]["full recipe"].items():
        assert low <= mean <= high, metric
    assert "variance" in first["families"]["full recipe"]
    assert "full recipe" in output
    files = {"equivariance.json", "equivariance.png", "neighbors.png"}
    assert {path.name for path in (tmp_path / "o").iterdir()} == files
    for folder in (encoder / "export", twin / "export"):
        assert (folder / f"equivariance.{photos.name}.png").is_file()
        assert f"By augmentation on `{photos.name}`" in (folder / "README.md").read_text()
        assert read_record(folder)["equivariance"][photos.name] == first


@pytest.mark.slow
def test_two_processes_measure_equivariance_once(encoder, photos, tmp_path):
    """The second used to measure too, and to write the same files at the same time."""
    words = on(photos, "--draws", 1, "-o")
    care_hub_command("equivariance", encoder, *words, tmp_path / "one")
    again = ("-m", "care_hub", "equivariance", encoder, *words, tmp_path / "two")
    twice = run_forked(*again, processes=2)
    assert twice.stdout.count("Does R know") == 1
    one, two = (means(tmp_path / name / "equivariance.json") for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)  # one thread adds up in another order than two
    assert read_record(encoder / "export")["equivariance"][photos.name]["draws"] == 1


def means(path) -> dict[str, float]:
    (result,) = json.loads(path.read_text())["encoders"].values()
    return {family: metrics["invariance_error"][0] for family, metrics in result["families"].items()}


def test_only_the_main_process_writes(encoder, photos, tmp_path, monkeypatch):
    def files() -> dict:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    other = SimpleNamespace(
        is_main_process=False, process_index=0, num_processes=1, device=torch.device("cpu")
    )
    other.gather = lambda x: x
    monkeypatch.setattr(commands, "inference_accelerator", lambda: other)
    before, data = files(), DataConfig("imagefolder", data_root=str(photos))
    names, output = (str(encoder),), str(tmp_path / "o")
    assert commands.evaluate_equivariance(names, data, images=16, draws=1, seed=0, output=output) == {}
    assert commands.evaluate_knn(str(encoder), data) == {}
    config = EvalConfig("imagefolder", data_root=str(photos), encoder=str(encoder))
    assert commands.evaluate(config) == {}
    assert files() == before


def test_a_network_of_timm_is_measured_by_its_features(photos, tmp_path):
    overlay = {"input_size": (3, 32, 32)}
    timm.models.save_for_hf(
        timm.create_model("test_resnet", pretrained_cfg_overlay=overlay), tmp_path, safe_serialization=True
    )
    before, data = visible(tmp_path), DataConfig("imagefolder", data_root=str(photos))
    found = commands.evaluate_equivariance((str(tmp_path),), data, images=8, draws=1)[str(tmp_path)]
    assert found["space"] == "backbone" and list(found["attributes"]) == ["backbone"]
    assert found["families"]["color"]["motion"][0] > 0
    assert 0 <= found["families"]["color"]["same_image_mrr"][0] <= 1
    assert visible(tmp_path) == before  # no card of ours in a folder of theirs


def test_what_can_not_be_compared_is_refused(encoder, photos, tmp_path):
    def said(*words) -> str:
        return care_hub_command(*words, ok=False)

    larger = Encoder.new("resnet10_w16_small", image_size=40, hidden=8, outputs=4)
    larger.save_pretrained(tmp_path / "larger")
    (tmp_path / "file").write_text("")
    assert "32 and 40 px" in said("equivariance", encoder, tmp_path / "larger", *on(photos))
    assert "is not a folder" in said("equivariance", encoder, *on(photos, "-o", tmp_path / "file"))
    assert "no test split" in said("knn", encoder, *on(photos / "train"))


def test_transfer_to_real_photos(shared, tmp_path):
    """Trained on rendered shapes, probed on photos of clothes: better than the most frequent class."""
    name = "resnet10_w16_small.care_shapes"
    result = eval_linear(name, *on(shared("data/clothing"), "--output-dir", tmp_path / "o"))
    assert result["top1"] > 30 and (tmp_path / "o" / "linear_head.clothing.safetensors").is_file()


def test_a_second_folder_leaves_the_results_of_the_first_alone(encoder, photos, tmp_path):
    """Both were kept under the one name "imagefolder", the second in place of the first."""
    export = encoder / "export"
    old = shutil.copytree(photos, tmp_path / "old--photos")
    second = shutil.copytree(photos, tmp_path / "second")
    (second / "train" / "warm").rename(second / "train" / "hot")
    (second / "test" / "warm").rename(second / "test" / "hot")
    eval_linear(encoder, *on(old))
    before = visible(export)
    result = eval_linear(encoder, *on(second))
    care_hub_command("equivariance", encoder, *on(second, "--draws", 1, "--dataset-label", "mine"))
    assert result["dataset"] == "second"
    after = visible(export)
    assert after["linear_head.old--photos.safetensors"] == before["linear_head.old--photos.safetensors"]
    assert {"linear_head.second.safetensors", "equivariance.mine.png"} < after.keys()
    assert care_hub.load_linear_head(encoder, "old--photos").class_names == ["cold", "warm"]
    assert care_hub.load_linear_head(encoder, "second").class_names == ["cold", "hot"]
    assert set(read_record(export)["accuracy"]) == {"old--photos", "second"}
    words = ["--encoder", str(encoder), *on(second)]
    assert (
        "replaces what was measured on 'second' before" in CliRunner().invoke(cli.eval_linear, words).stdout
    )


def test_a_head_of_a_former_version_still_loads(encoder, photos):
    eval_linear(encoder, *on(photos, "--dataset-label", "imagefolder"))
    eval_linear(encoder, *on(photos))
    assert care_hub.load_linear_head(encoder, "imagefolder").dataset == "imagefolder"


def test_on_a_folder_of_someone_else_results_are_shown(encoder, photos, monkeypatch):
    def denied(path):
        raise CareHubError(f"'{path}' can't be written (Permission denied).")

    before = visible(encoder / "export")
    monkeypatch.setattr(commands, "make_folder", denied)
    done = CliRunner().invoke(cli.main, ["knn", str(encoder), *on(photos)])
    assert "shown and not saved" in done.output and "top1" in json.loads(done.stdout.splitlines()[-1])
    assert visible(encoder / "export") == before
    assert "can't be written" in refusal(encoder, *on(photos))

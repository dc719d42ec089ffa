"""train.py: what it writes, what it survives, and what it refuses."""

import json
import logging
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import (
    ROOT,
    TINY,
    care_hub_command,
    command,
    metrics,
    randomized,
    refusal,
    train,
    train_here,
    visible,
)
from PIL import Image
from safetensors.torch import load_file

import care_hub
from care_hub import cli
from care_hub.augment import AugmentationConfig
from care_hub.config import TrainConfig
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.hub.card import card_text
from care_hub.models import build_backbone
from care_hub.schedule import Plan
from care_hub.training.checkpoint import CheckpointWriter
from care_hub.training.progress import Progress, start_trackers
from care_hub.training.run import conditions, initial_encoder, restore
from care_hub.training.summary import started_by
from care_hub.training.trainer import make_accelerator, make_encoder, make_optimizer


def test_a_run_leaves_all_that_was_promised(tiny_run):
    *rows, last = metrics(tiny_run)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    for r in rows:
        assert {"epoch", "infonce", "equivariance", "lr", "images_per_second"} <= r.keys()
        assert r["loss"] == pytest.approx(r["infonce"] + r["weight"] * r["equivariance"], rel=1e-4)
        assert r["equivariance"] > 0
    results = json.loads((tiny_run / "results.json").read_text())
    geometry = {"rotation_error", "invariance_error", "rotation_invariance_ratio", "gram_deviation"}
    assert {"knn_top1", "knn_color_top1", *geometry} <= results.keys()
    assert last == {"step": 6, "epoch": 1, "knn_top1": pytest.approx(results["knn_top1"], abs=1e-4)}
    assert 5 < results["knn_top1"] < 100 and 0 < results["rotation_invariance_ratio"] < 1.2
    assert results["training_seconds"] > 0 and results["images_per_second"] > 0
    resolved = yaml.safe_load((tiny_run / "config.yaml").read_text())
    assert TrainConfig(**resolved).batch_size == 16
    care = json.loads((tiny_run / "export" / "config.json").read_text())["care"]
    assert care["method"] == "CARE-simclr" and care["dataset"] == "shapes"
    assert care["training"]["equiv_splits"] == 4
    assert Image.open(tiny_run / "export" / "neighbors.png").size[0] > 600
    assert not [p for p in tiny_run.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl")]
    assert care_hub.load_encoder(tiny_run).encode(torch.zeros(2, 3, 32, 32)).shape == (2, 16)


def test_lambda_grows_in_a_run(tiny_run):
    weights = [r["weight"] for r in metrics(tiny_run) if "loss" in r]
    step = TrainConfig.weight / (TrainConfig.epochs / 4 * (5000 // 16))
    assert weights == pytest.approx([step * k for k in range(1, 7)])


def test_training_from_python_prints_nothing_and_leaves_the_process_as_it_was(
    photos, tmp_path, capsys, caplog, recwarn, one_thread
):
    options = {
        "dataset_name": "imagefolder",
        "data_root": str(photos),
        "image_size": 32,
        "save_root": str(tmp_path),
    }
    config = TrainConfig(
        **options, batch_size=16, equiv_splits=4, max_steps=1, run_name="r", mixed_precision="no"
    )
    torch.manual_seed(1)
    state, filters = torch.get_rng_state(), list(__import__("warnings").filters)
    with caplog.at_level(logging.INFO, "care_hub"):
        assert care_hub.train(config)["images_per_second"] > 0
    assert torch.equal(torch.get_rng_state(), state) and __import__("warnings").filters == filters
    assert torch.get_num_threads() == 1
    assert capsys.readouterr().out == "" and "Trained CARE-simclr on imagefolder" in caplog.text


def test_one_process_may_train_in_one_precision_after_the_other():
    for wanted in ("bf16", "no"):
        assert make_accelerator(TrainConfig(mixed_precision=wanted)).mixed_precision == wanted


@pytest.fixture
def odd_data(tmp_path) -> Path:
    """A data set with unusual columns, splits of unlike size, and a broken image, in an unusual folder."""
    root, random = tmp_path / "odd 'data'", np.random.RandomState(0)
    columns = {"photo": datasets.Image(), "scan": datasets.Image()}
    for split, count in (("train", 64), ("validation", 40)):
        images = [Image.fromarray(image) for image in random.randint(0, 256, (count, 36, 40, 3), np.uint8)]
        cells = [*images[1:], {"bytes": b"broken", "path": "broken.png"}]
        kinds = [f"kind {k % 3}" for k in range(count)]
        rows = {"photo": images, "scan": cells, "label": [0.5] * count, "kind": kinds}
        features = columns | {"label": datasets.Value("float32"), "kind": datasets.Value("string")}
        table = datasets.Dataset.from_dict(rows, datasets.Features(features))
        table.to_parquet(root / f"{split}-00000-of-00001.parquet")
    return root


def next_commands_of(screen: str) -> list[list[str]]:
    """The words of each command that the closing screen shows."""
    return [shlex.split(line, comments=True) for line in screen.split("\nNext\n")[1].splitlines() if line]


@pytest.mark.launches
def test_every_command_on_the_final_screen_works(odd_data, photos, tmp_path, monkeypatch, capsys, one_family):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: name)  # whether or not the tests' environment is active
    flags = ("--dataset-name", "ann/odd", "--data-root", odd_data, "--image-column", "scan")
    flags += ("--label-column", "kind", "--dataset-label", "odd one", "--skip-broken-images")
    flags += ("--image-size", "32", "--temperature", "0.3", "--steering-head")
    screen = train_here("runs", *flags, "--run-name", "mine/a 'b'", "--max-steps", "1")
    assert "Nothing was measured: --max-steps ended the run" in screen
    shown = next_commands_of(screen)
    assert [words[1] for words in shown] == ["embed", "-c", "probe", "train", "equivariance"]
    for program, *words in shown:
        words = [word.replace("YOUR_IMAGES", str(photos / "test" / "warm")) for word in words]
        if program == "care-hub":
            few = ["--images", "8", "--draws", "1"] if words[0] == "equivariance" else []
            care_hub_command(*words, *few)
        else:
            exec(words[1])
            assert capsys.readouterr().out == "(8, 16)\n"
    care, plain = (tmp_path / "runs" / "mine" / name for name in ("a 'b'", "a 'b'-plain"))
    before, after = (yaml.safe_load((run / "config.yaml").read_text()) for run in (care, plain))
    assert {k for k in before if before[k] != after[k]} == {"weight", "run_name"} and after["weight"] == 0
    for run, steers in ((care, True), (plain, False)):  # without lambda there is nothing to steer
        assert all(("uniformity" in row) == steers for row in metrics(run))
        assert (run / "export" / "contrastive_head.safetensors").exists() == steers
        assert ("the head that rotates" in (run / "export" / "README.md").read_text()) == steers


def test_next_commands_are_those_of_the_program_that_was_started(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    here, launched = str(ROOT / "train.py"), {"ACCELERATE_MIXED_PRECISION": "no"}
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2"}
    probe = f"python {ROOT / 'eval_linear.py'}"
    assert started_by(here, {}) == (f"python {here}", "care-hub", probe)
    assert started_by(here, launched)[0] == f"accelerate launch {here}"
    assert started_by(here, torchrun)[0] == f"torchrun --nproc_per_node 2 {here}"
    assert started_by("/bin/care-hub", {}) == ("care-hub train", "care-hub", "care-hub probe")
    assert started_by("/x/care_hub/__main__.py", torchrun)[0] == (
        "torchrun --nproc_per_node 2 -m care_hub train"
    )
    own = tmp_path / "train.py"  # of somebody who calls care_hub.train
    assert started_by(str(own), {})[0] == "care-hub train"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert started_by(here, {})[1] == "python -m care_hub"


def test_the_final_screen_suggests_nothing_that_needs_a_test_split_where_there_is_none(
    photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "which", lambda name: name)  # as where the package's commands are on the path
    data = ("--dataset-name", "imagefolder", "--data-root", photos / "train", "--image-size", "32")
    screen = train_here(tmp_path, *data, "--max-steps", "1")
    assert "care-hub embed" in screen and "--weight 0" in screen
    assert "--dataset-name" not in screen.split("\nNext\n")[1]  # no linear head, no comparison


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lars"])
def test_optimizers_step_as_their_plain_forms_do(name):
    config = TrainConfig(model="resnet10_w16_small", optimizer=name, lr=0.01)
    encoders, views = [], torch.randn(8, 3, 32, 32, dtype=torch.float64)
    for plain in (False, True):
        torch.manual_seed(0)
        encoder = Encoder.new(config.model).double().train()
        optimizer = make_optimizer(config, encoder)
        assert name == "lars" or optimizer.param_groups[0]["fused"]
        for group in optimizer.param_groups:
            group["fused"] = not plain and group.get("fused")
        for _ in range(3):
            encoder(views).square().sum(dim=0)[:64].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        encoders.append(encoder.state_dict())
    for key, value in encoders[0].items():
        assert torch.allclose(value, encoders[1][key], rtol=1e-6, atol=1e-8), key


@pytest.mark.launches
def test_a_network_with_dropout_is_resumed_to_the_bit_where_lambda_starts(photos, tmp_path):
    flags = ("--dataset-name", "imagefolder", "--data-root", photos, "--image-size", "32", "--max-steps", "3")
    flags += ("--model", "repghostnet_050", "--steering-head", "--checkpoint-every", "2", "--run-name", "r")
    flags += ("--weight-start-epochs", "0.67", "--weight-warmup-epochs", "0.67")
    plan = train_here(tmp_path, *flags)
    assert "after 0.67 epochs" in plan and "3 steps of 16 images (1.0 epochs; price: 4 SimCLR steps)" in plan
    weights = [row["weight"] for row in metrics(tmp_path / "r") if "loss" in row]
    assert weights == [0, 0, TrainConfig.weight / 2]
    shutil.copytree(tmp_path / "r", tmp_path / "again" / "r", ignore=shutil.ignore_patterns("step-00000003"))
    assert "resumed with" not in train_here(tmp_path / "again", *flags, "--resume")
    for name in ("model", "projection", "contrastive_head"):
        path = Path("r") / "export" / f"{name}.safetensors"
        assert (tmp_path / path).read_bytes() == (tmp_path / "again" / path).read_bytes()


@pytest.mark.launches
def test_a_network_with_infinite_constants_is_trained_saved_and_resumed(photos, tmp_path, monkeypatch):
    def with_constant(*arguments):
        backbone = build_backbone(*arguments)
        backbone.register_buffer("largest", torch.tensor([float("inf")]))
        return backbone

    monkeypatch.setattr("care_hub.encoder.build_backbone", with_constant)
    flags = ("--dataset-name", "imagefolder", "--data-root", photos, "--image-size", "32", "--max-steps", "3")
    flags += ("--model", "resnet10t", "--checkpoint-every", "2", "--run-name", "r")
    train_here(tmp_path, *flags)
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "step-00000003")
    train_here(tmp_path, *flags, "--resume")
    assert Encoder.from_pretrained(tmp_path / "r").backbone.largest.isinf()


def test_a_resume_says_what_has_changed_around_it(tmp_path, caplog):
    def on(processes):
        device, unwrap = torch.device("cpu"), lambda method: method
        others = {"is_main_process": True, "mixed_precision": "no", "scaler": None}
        return SimpleNamespace(num_processes=processes, device=device, unwrap_model=unwrap, **others)

    method = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(method.parameters())
    writer = CheckpointWriter(tmp_path / "checkpoints")
    extra = {"seconds": 1.5, "scaler": None} | conditions(on(2))
    assert {"processes", "threads", "torch"} < extra.keys()
    writer.save(3, method.state_dict(), optimizer.state_dict(), extra)
    writer.wait()
    with caplog.at_level(logging.INFO, "care_hub"):
        assert restore(tmp_path, method, optimizer, on(2)) == (3, 1.5) and not caplog.text
        restore(tmp_path, method, optimizer, on(4))
    assert "resumed with processes 2 -> 4: the same run up to rounding" in caplog.text


def test_gradient_accumulation_averages_micro_batches(tmp_path):
    printed = train_here(tmp_path, "--max-steps", "2", "--gradient-accumulation", "3", "--run-name", "a")
    assert "average of 3 independent micro-batches" in printed and len(metrics(tmp_path / "a")) == 2


def photos_at_32(photos) -> tuple:
    return ("--dataset-name", "imagefolder", "--data-root", photos, "--image-size", "32")


@pytest.mark.launches
@pytest.mark.parametrize(
    "more",
    [(), ("--method", "moco", "--optimizer", "adamw"), ("--steering-head",)],
    ids=["simclr", "moco", "steering"],
)
def test_a_frozen_backbone_stays_to_the_bit_and_the_run_is_resumed_where_it_has_gone(
    more, photos, tmp_path, monkeypatch
):
    torch.manual_seed(0)
    initial = Encoder.new("resnet10_w16_small", 32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.2), hidden=8, outputs=4)
    initial = randomized(initial)
    folder = initial.save_pretrained(tmp_path / "theirs")
    flags = (*photos_at_32(photos), *more, "--init", folder, "--freeze-backbone", "--run-name", "r")
    flags += ("--checkpoint-every", "1", "--max-steps")
    said = train_here(tmp_path / "a", *flags, 3)
    assert "initialized from theirs (license: see there), head new, 128 -> 16, backbone frozen" in said
    exported = Encoder.from_pretrained(tmp_path / "a" / "r")
    for name, value in exported.backbone.state_dict().items():
        assert torch.equal(value, initial.backbone.state_dict()[name]), name
    assert (exported.config.mean, exported.config.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.2))
    optimizer = load_file(tmp_path / "a" / "r" / "checkpoints" / "step-00000003" / "optimizer.safetensors")
    assert {key.split(".")[0] for key in optimizer} == {str(k) for k in range(5)}  # the head's alone

    # Killed before its first checkpoint, stopped after the next, and each time without the folder.
    copied = shutil.ignore_patterns("checkpoints", "export", "results.json")
    shutil.copytree(tmp_path / "a" / "r", tmp_path / "b" / "r", ignore=copied)
    shutil.rmtree(folder)
    for steps in (2, 3):
        train_here(tmp_path / "b", *flags, steps, "--resume", "auto")
    whole, resumed = (tmp_path / place / "r" / "checkpoints" / "step-00000003" for place in "ab")
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    assert "is finished" in train_here(tmp_path / "b", *flags, 3, "--resume", "auto")


@pytest.mark.parametrize("outputs", [8, 4])
def test_both_heads_are_taken_over_where_they_have_the_sizes_asked_for(outputs):
    initial = Encoder.new("resnet10_w16_small", hidden=16, outputs=8)
    initial.set_contrastive_head(True)
    heads = initial.projection, initial.contrastive_head
    config = TrainConfig(init="x.y", model="resnet10_w16_small", projection_hidden=16, projection_dim=outputs)
    made = make_encoder(config, initial, AugmentationConfig(), 1.0)
    made.set_contrastive_head(True)
    assert [made.projection is heads[0], made.contrastive_head is heads[1]] == [outputs == 8] * 2
    assert made.eval()(torch.zeros(1, 3, 32, 32), contrastive=True).shape == (1, outputs)


def test_a_run_takes_over_architecture_head_and_statistics_and_says_from_whom(tmp_path):
    name, flags = "resnet10_w16_small.care_shapes", ("--max-steps", "1", "--run-name", "r", "--init")
    said = train_here(
        tmp_path, *flags, name, "--projection-hidden", "512", "--projection-dim", "128", "--lr", "0"
    )
    assert f"initialized from {name} (license: mit), head taken over\n" in said
    ours, theirs = Encoder.from_pretrained(tmp_path / "r"), Encoder.from_pretrained(name)
    for key, value in theirs.named_parameters():
        assert torch.equal(value, ours.get_parameter(key)), key
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["model"] == "resnet10_w16_small"
    assert ours.config.training["model"] == "resnet10_w16_small" and ours.config.training["init"] == name
    card = (tmp_path / "r" / "export" / "README.md").read_text()
    assert f"initialized from `{name}` (its license: mit) and trained without labels" in card


@pytest.mark.launches
def test_the_license_of_the_weights_to_begin_with_is_that_of_their_card(server, export):
    card = (export / "README.md").read_text().replace("license: mit", "license: cc-by-nc-sa-4.0")
    server.put("ann/birds", visible(export) | {"README.md": card.encode()})
    found = initial_encoder(TrainConfig(init="ann/birds"))
    assert found.config.init == {"name": "ann/birds", "license": "cc-by-nc-sa-4.0"}
    found.save_pretrained(export)
    (export / "README.md").unlink()
    text = card_text(export)
    assert "from `ann/birds` (its license: cc-by-nc-sa-4.0)" in text and "license: other\n" in text
    (export / "README.md").write_text(text)
    found = initial_encoder(TrainConfig(init=str(export)))
    assert found.config.init == {"name": export.parent.name, "license": "cc-by-nc-sa-4.0"}


def test_a_network_of_timm_is_trained_on_images_of_a_size_of_ones_own(photos, tmp_path, monkeypatch):
    name = "test_vit.r160_in1k"
    torch.manual_seed(0)
    network = randomized(timm.create_model(name))
    timm.models.save_for_hf(network, tmp_path / "timm", safe_serialization=True)
    seen = replace(timm.get_pretrained_cfg(name), file=str(tmp_path / "timm" / "model.safetensors"))
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, name, seen)  # there is no network
    flags = ("--dataset-name", "imagefolder", "--data-root", photos, "--max-steps", "1", "--run-name")
    for run_name, source in (("folder", tmp_path / "timm"), ("tag", name)):
        said = train_here(tmp_path, *flags, run_name, "--init", source, "--freeze-backbone", "--dry-run")
        assert "test_vit (" in said and "images at 160 px" in said and "license: apache-2.0" in said
    train_here(tmp_path, *flags, "r", "--init", name, "--freeze-backbone", "--image-size", "64")
    trained, x = Encoder.from_pretrained(tmp_path / "r"), torch.rand(2, 3, 64, 64)
    network.reset_classifier(0)
    network.set_input_size(img_size=64)
    with torch.no_grad():
        torch.testing.assert_close(trained.features(x), network(x))
    assert (trained.config.model, trained.config.mean) == ("test_vit", seen.mean)
    card = (tmp_path / "r" / "export" / "README.md").read_text()
    assert "license: apache-2.0\n" in card and f"initialized from `{name}` (its license: apache-2.0)" in card


def test_settings_of_accelerate_are_those_of_the_options(photos, tmp_path, monkeypatch):
    variable = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    flags = ("--dataset-name", "imagefolder", "--data-root", photos, "--image-size", "32", "--max-steps", "1")
    flags += ("--momentum", "0", "--weight-decay", "0", "--warmup-epochs", "0")

    def weights(name, *more):
        printed = train_here(tmp_path, *flags, *more, "--run-name", name)
        return printed, load_file(tmp_path / name / "export" / "model.safetensors")

    _, still = weights("still", "--lr", "0")
    shown, one = weights("one")
    assert "precision float32 (by mixed_precision)" in shown and "compiled" not in shown
    shown, ours = weights("ours", "--gradient-accumulation", "3")
    assert "3 independent micro-batches, by gradient_accumulation " in shown
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")  # the network as it is, by way of torch.compile
        before = torch._dynamo.utils.counters["frames"]["ok"]
        shown, compiled = weights("compiled")
        assert "compiled by Accelerate's dynamo_backend" in shown
        assert torch._dynamo.utils.counters["frames"]["ok"] > before
        assert all(torch.equal(one[k], compiled[k]) for k in one)
    monkeypatch.setenv(variable, "3")
    shown, theirs = weights("theirs")
    assert "3 independent micro-batches, by Accelerate's gradient_accumulation_steps" in shown
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    saved = yaml.safe_load((tmp_path / "theirs" / "config.yaml").read_text())
    assert saved["gradient_accumulation"] == 3
    # Without momentum a step is the gradient: its length is that of a mean, no third or triple of it.
    moved = [
        sum(float((end[k] - still[k]).square().sum()) for k in end if k.endswith("weight")) ** 0.5
        for end in (one, theirs)
    ]
    assert 0.5 < moved[1] / moved[0] < 1.5
    (tmp_path / "c.yaml").write_text("gradient_accumulation: 2")
    for given in (("--gradient-accumulation", "2"), ("--config", tmp_path / "c.yaml")):
        refused = refusal("--save-root", tmp_path, *TINY, *given)
        assert "--gradient-accumulation 2" in refused and "gradient_accumulation_steps 3" in refused
    for wrong in ("0", "-1", "many"):
        monkeypatch.setenv(variable, wrong)
        assert f"a whole number from 1 on, got '{wrong}'" in refusal("--save-root", tmp_path, *TINY)


def test_values_go_to_the_tracker_every_so_many_steps_and_to_the_project_that_is_named(tmp_path, monkeypatch):
    sent, started = [], []
    accelerator = SimpleNamespace(
        is_main_process=True,
        device=torch.device("cpu"),
        log=lambda row, step: sent.append(step),
        project_configuration=SimpleNamespace(),
        init_trackers=lambda *arguments: started.append(arguments),
    )
    config = TrainConfig(log_with="wandb", log_freq=3, project="mine", user="ann")
    progress = Progress(tmp_path, Plan.of(config, 64 * 8), 0, 0.0, config, accelerator)
    for step in range(8):
        progress.add_losses({k: torch.tensor(1.0) for k in ("loss", "infonce", "equivariance")})
        progress.add_step(step, 0.1, 0.1, 1.0)
    progress.add_knn(8, 50.0)
    progress.close()
    assert sent == [3, 6, 8] and len(metrics(tmp_path)) == 9
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    for some in (config, replace(config, project=None, user=None), TrainConfig(log_with="tensorboard")):
        start_trackers(tmp_path, some, accelerator)
    start_trackers(tmp_path, TrainConfig(project="unused"), accelerator)
    assert [project for project, *_ in started] == ["mine", "theirs", "care_hub"]
    own = {"name": tmp_path.name, "dir": str(tmp_path)}
    expected = [{"wandb": own | {"entity": "ann"}}, {"wandb": own}, {"tensorboard": {}}]
    assert [options for *_, options in started] == expected
    monkeypatch.setenv("WANDB_NAME", "theirs")
    start_trackers(tmp_path, config, accelerator)
    assert started[-1][2] == {"wandb": {"dir": str(tmp_path), "entity": "ann"}}


def test_a_tracker_that_is_missing_or_can_not_start_is_a_sentence(photos, tmp_path, monkeypatch):
    flags = ("--dataset-name", "imagefolder", "--data-root", photos, "--image-size", "32", *TINY)
    flags += ("--save-root", tmp_path, "--max-steps", "1", "--log-with", "tensorboard")

    def fails(*arguments):
        raise RuntimeError("there is no account")

    with monkeypatch.context() as patch:
        patch.setattr("accelerate.Accelerator.init_trackers", fails)
        assert "--log-with tensorboard can't be started (there is no account)" in refusal(*flags)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    assert "not installed; type: pip install tensorboard" in refusal(*flags)


def test_class_folders_with_a_broken_image(photos, tmp_path):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    Image.open(root / "train/warm/00.png").convert("L").save(root / "train/warm/gray.png")
    Image.open(root / "train/warm/01.png").convert("RGBA").save(root / "train/warm/alpha.png")
    Image.open(root / "train/warm/02.png").convert("CMYK").save(root / "train/warm/press.jpg")
    broken = root / "train/cold/broken.jpg"
    Image.open(root / "train/cold/00.png").resize((400, 400)).save(broken)
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    flags = ("--dataset-name", "imagefolder", "--data-root", root, "--image-size", "32", "--max-steps", "2")
    error = refusal("--save-root", tmp_path, *TINY, *flags, "--run-name", "a")
    assert "broken.jpg" in error and "--skip-broken-images" in error
    printed = train_here(tmp_path, *flags, "--run-name", "b", "--skip-broken-images")
    assert "skipped 1 broken images" in printed and "broken.jpg" in printed and "51 images" in printed


def test_a_dry_run_reads_no_image(odd_data, tmp_path, monkeypatch):
    def read(*arguments):
        raise AssertionError("an image was decoded or rendered")

    monkeypatch.setattr("care_hub.data.images.to_square", read)
    monkeypatch.setattr("care_hub.data.shapes.render", read)
    flags = ("--dataset-name", "ann/odd", "--data-root", odd_data, "--label-column", "kind", "--dry-run")
    assert "64 images at 224 px" in train_here(tmp_path / "runs", *flags)
    assert "5,000 images at 32 px" in train_here(tmp_path / "runs", "--dry-run")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_real_cifar10_trains(shared, tmp_path):
    root = shared("data/cifar10")
    flags = ("--dataset-name", "cifar10", "--data-root", root, "--max-steps", "2", "--run-name", "c")
    assert "50,000 images at 32 px" in train_here(tmp_path, *flags)
    care = json.loads((tmp_path / "c" / "export" / "config.json").read_text())["care"]
    assert care["mean"] == [0.4914, 0.4822, 0.4465]


@pytest.mark.launches
def test_accelerate_launch_uses_all_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # which commands in this process set
    done = train(tmp_path, "--dry-run", launcher=("python", "-m", "accelerate.commands.launch"))
    assert f"CPU, {torch.get_num_threads()} threads" in done.stdout or "cuda" in done.stdout.lower()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--dataset-name", "cifra10"], "did you mean 'cifar10'"),
        (["--dataset-name", "cifar10", "--data-root", "/nowhere"], "'/nowhere' is not a folder"),
        (["--dataset-name", "imagefolder"], "needs --data-root"),
        (["--batch-size", "100", "--equiv-splits", "16"], "--equiv-splits 16 equal groups"),
        (["--batch-size", "64", "--equivariant-batch-size", "24"], "nearest that does is 16"),
        (["--batch-size", "6000", "--weight", "0"], "fewer than the 6000"),
        (["--epochs", "0"], "--epochs must be positive"),
        (["--model", "resnet18_cifer"], "did you mean 'resnet18_cifar'"),
        (
            ["--weight", "0", "--loss-subtype", "none"],
            "--loss-subtype none with --weight 0 leaves no loss at all",
        ),
        (["--resume"], "--resume needs --run-name"),
        (["--resume", "--run-name", "absent"], "no run to resume"),
        (["--config", "absent.yaml"], "can't be read"),
        (["--mixed-precision", "fp61"], "fp16"),
        (["--init", "resnet10_w16_smal.care_shapes"], "did you mean 'resnet10_w16_small.care_shapes'"),
        (["--init", "resnet10_w16_small.care_shapes", "--model", "resnet18"], "leave --model out"),
        (["--freeze-backbone"], "--freeze-backbone needs --init"),
    ],
)
def test_what_a_user_gets_wrong_ends_in_one_sentence(flags, sentence, tmp_path):
    assert sentence in refusal(*flags, "--save-root", tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_existing_run_is_not_overwritten_and_resume_changes_nothing(tiny_run):
    place = ("--save-root", tiny_run.parent, "--run-name", "tiny")
    before = (tiny_run / "results.json").read_bytes()
    assert "exists; choose another --run-name" in refusal(*place, *TINY, "--max-steps", "6")
    assert "--lr was 0.2 in this run" in refusal(*place, "--resume", "--lr", "0.5")
    assert (tiny_run / "results.json").read_bytes() == before


def test_runs_without_a_name_get_the_first_free_number(photos, tmp_path):
    flags = ("--dataset-name", "imagefolder", "--data-root", photos, "--image-size", "32", "--max-steps", "1")
    for _ in range(2):
        train_here(tmp_path, *flags)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["imagefolder-simclr-1", "imagefolder-simclr-2"]


def test_a_checkpoint_of_another_model_is_refused(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "tiny")
    config = tmp_path / "tiny" / "config.yaml"
    config.write_text(config.read_text().replace("projection_dim: 16", "projection_dim: 8"))
    refused = refusal("--save-root", tmp_path, "--run-name", "tiny", "--resume")
    assert "does not fit its architecture" in refused


def test_export_holds_what_the_checkpoint_holds(tiny_run):
    stored = load_file(tiny_run / "checkpoints" / "step-00000006" / "model.safetensors")
    encoder = care_hub.Encoder.from_pretrained(tiny_run)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, stored[f"encoder.{name}"])


def test_callbacks_are_told_of_steps_epochs_and_the_end_and_change_nothing(photos, tmp_path):
    options = {"dataset_name": "imagefolder", "data_root": photos, "image_size": 32, "mixed_precision": "no"}
    options |= {"batch_size": 16, "equiv_splits": 4, "projection_hidden": 32, "projection_dim": 16}
    options |= {"weight_start_epochs": 0, "max_steps": 6, "save_root": tmp_path}  # two epochs
    rows, shapes, ends = [], {}, []

    def encode(epoch: int, encoder: Encoder) -> None:
        shapes[epoch] = encoder.encode(torch.rand(2, 3, 32, 32)).shape

    callbacks = care_hub.Callbacks(rows.append, encode, lambda *found: ends.append(found))
    results = care_hub.train(TrainConfig(**options, run_name="told"), callbacks)
    assert rows == metrics(tmp_path / "told") and len(rows) == 6
    assert shapes == {1: (2, 16), 2: (2, 16)} and ends == [(results, tmp_path / "told")]

    def fail(epoch: int, encoder: Encoder) -> None:
        raise CareHubError("that is enough.")

    with pytest.raises(CareHubError, match="enough"):
        care_hub.train(TrainConfig(**options, run_name="ended"), care_hub.Callbacks(epoch=fail))
    care_hub.train(TrainConfig(**options, run_name="ended", resume=True))
    told, ended = (care_hub.load_encoder(tmp_path / name).fingerprint for name in ("told", "ended"))
    assert told == ended


def test_a_run_that_is_finished_twice_has_its_closing_knn_once(tiny_run, tmp_path, monkeypatch):
    shutil.copytree(tiny_run, tmp_path / "tiny")
    before = metrics(tiny_run)
    monkeypatch.setattr("care_hub.evaluate.monitor.FINAL_IMAGES", 8)
    command(cli.train, "--save-root", tmp_path, "--run-name", "tiny", "--resume")
    assert metrics(tmp_path / "tiny") == before


@pytest.fixture
def watched(photos, tmp_path, monkeypatch):
    """`watched(tracker)`: the folder of a run of two epochs of three steps that `tracker` has followed."""
    monkeypatch.chdir(tmp_path)

    def run(tracker: str) -> Path:
        flags = ("--dataset-name", "imagefolder", "--data-root", photos, "--image-size", "32")
        flags += ("--epochs", "2", "--knn-every", "1", "--log-with", tracker, "--run-name", "watched")
        train_here(Path("runs"), *flags)
        assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # all is in the run's folder
        assert [path.name for path in Path("runs").iterdir()] == ["watched"]
        return Path("runs/watched")

    return run


@pytest.mark.launches
def test_tensorboard_shows_curves_results_figures_and_hyperparameters(watched):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = watched("tensorboard")
    events = event_accumulator.EventAccumulator(str(run / "care_hub")).Reload()
    results = json.loads((run / "results.json").read_text())
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("knn_top1")] == [3, 6]
    for name, value in results.items():
        assert [(e.step, e.value) for e in events.Scalars(f"final/{name}")] == [(6, pytest.approx(value))]
    for file in (run / "export" / "neighbors.png", run / "equivariance.png"):
        (shown,) = events.Images(file.stem)
        assert (shown.width, shown.height) == Image.open(file).size
    (file,) = run.rglob("hparams.yml")
    options = yaml.safe_load(file.read_text())
    assert (options["lr"], options["epochs"], options["model"]) == (0.2, 2, "resnet10_w16_small")


@pytest.mark.launches
def test_wandb_shows_the_same(watched, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    run = watched("wandb")
    (file,) = run.glob("wandb/offline-run-*/*.wandb")  # protocol buffers, whose text is readable
    content, results = file.read_bytes(), json.loads((run / "results.json").read_text())
    for name in ("theirs", "watched", "knn_top1", *(f"final/{name}" for name in results)):
        assert name.encode() in content, name
    assert b"lr\x82\x01\x030.2" in content  # JSON of three characters: a number, in no quotes
    for figure in (run / "export" / "neighbors.png", run / "equivariance.png"):
        (shown,) = file.parent.glob(f"files/media/images/{figure.stem}_*.png")
        np.testing.assert_array_equal(np.asarray(Image.open(shown)), Image.open(figure).convert("RGB"))


def test_files_of_a_run_follow_the_umask_and_its_folder_may_have_any_name(photos, tmp_path):
    data = ("--dataset-name", "imagefolder", "--data-root", photos, "--image-size", "32")
    root = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        root.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    before = os.umask(0o027)
    try:
        said = train_here(root, *data, "--max-steps", "2", "--knn-every", "1", "--run-name", "run")
    finally:
        os.umask(before)
    files = [path for path in root.rglob("*") if path.is_file()]
    assert {"model.safetensors", "neighbors.png", "config.yaml"} < {path.name for path in files}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert r"caf\udce9" in said and r"caf\udce9" in (root / "run" / "export" / "README.md").read_text()

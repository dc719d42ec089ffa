"""train.py: what it writes, what it survives, and what it refuses."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import ROOT, TINY, metrics, refusal, run, train, train_here
from PIL import Image
from safetensors.torch import load_file

import care_hub
from care_hub import augment, checkpoint, cli, trainer
from care_hub.config import Plan, TrainConfig, lr_at, weight_at
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.views import Cutter, make_views, order


def test_a_run_leaves_all_that_was_promised(tiny_run):
    rows = [r for r in metrics(tiny_run) if "loss" in r]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    for r in rows:
        assert {"epoch", "infonce", "equivariance", "lr", "images_per_second"} <= r.keys()
        assert r["loss"] == pytest.approx(r["infonce"] + r["weight"] * r["equivariance"], rel=1e-4) and r["equivariance"] > 0
    results = json.loads((tiny_run / "results.json").read_text())
    assert {
        "knn_top1",
        "knn_color_top1",
        "rotation_error",
        "invariance_error",
        "rotation_invariance_ratio",
        "gram_deviation",
    } <= results.keys()
    assert 5 < results["knn_top1"] < 100 and 0 < results["rotation_invariance_ratio"] < 1.2
    assert results["training_seconds"] > 0 and results["images_per_second"] > 0
    resolved = yaml.safe_load((tiny_run / "config.yaml").read_text())
    assert TrainConfig(**resolved).batch_size == 16
    care = json.loads((tiny_run / "export" / "config.json").read_text())["care"]
    assert care["method"] == "CARE-simclr" and care["dataset"] == "shapes" and care["training"]["equiv_splits"] == 4
    assert Image.open(tiny_run / "export" / "neighbours.png").size[0] > 600
    assert not [p for p in tiny_run.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl")]
    assert care_hub.load_encoder(tiny_run).encode(torch.zeros(2, 3, 32, 32)).shape == (2, 16)


def test_the_closing_screen_names_the_baseline_of_this_very_run(photos, tmp_path):
    flags = ("--dataset-name", "imagefolder", "--data-root", photos, "--image-size", "32", "--temperature", "0.3", "--run-name", "a b")
    screen = train_here(tmp_path, *flags, "--max-steps", "1")
    (line,) = (line for line in screen.splitlines() if "--weight 0" in line)
    words = shlex.split(line, comments=True)
    assert words[:3] == ["accelerate", "launch", "train.py"]
    assert CliRunner().invoke(cli.train, words[3:]).exit_code == 0
    care, plain = (yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("a b", "a b-plain"))
    assert {k for k in care if care[k] != plain[k]} == {"weight", "run_name"} and plain["weight"] == 0
    assert f"--data-root {photos}" in next(line for line in screen.splitlines() if "care-hub equivariance" in line)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lars"])
def test_optimisers_step_as_their_plain_forms_do(name):
    config = TrainConfig(model="resnet10_w16_small", optimizer=name, lr=0.01)
    encoders, views = [], torch.randn(8, 3, 32, 32, dtype=torch.float64)
    for plain in (False, True):
        torch.manual_seed(0)
        encoder = Encoder.new(config.model).double().train()
        optimizer = trainer.make_optimizer(config, encoder)
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


def test_killed_at_any_moment_a_resumed_run_equals_one_that_was_never_stopped(tmp_path):
    flags = ("--max-steps", "8", "--checkpoint-every", "2", "--epochs", "2")
    train_here(tmp_path, *flags, "--run-name", "whole")
    words = [sys.executable, ROOT / "train.py", "--save-root", tmp_path, *TINY, *flags, "--run-name", "killed"]
    process = subprocess.Popen([str(w) for w in words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed = tmp_path / "killed"
    while not list(killed.glob("checkpoints/step-*")) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # what a crash in mid-write leaves
    (killed / "checkpoints" / ".writing-1").mkdir()
    train_here(tmp_path, "--run-name", "killed", "--resume")
    for name in ("model.safetensors", "projection.safetensors"):
        assert (killed / "export" / name).read_bytes() == (tmp_path / "whole" / "export" / name).read_bytes()
    losses = [[r["loss"] for r in metrics(tmp_path / name)] for name in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    checkpoints = sorted(p.name for p in (killed / "checkpoints").glob("step-*"))
    assert checkpoints == ["step-00000006", "step-00000008"]
    shutil.rmtree(killed / "checkpoints" / "step-00000006")
    half = killed / "checkpoints" / "step-00000008" / "model.safetensors"
    half.write_bytes(half.read_bytes()[:1000])
    with pytest.raises(CareHubError, match="step-00000008' is damaged"):
        checkpoint.load(killed / "checkpoints")


def test_an_interrupted_run_keeps_its_last_step(tmp_path):
    words = [sys.executable, ROOT / "train.py", "--save-root", tmp_path, *TINY, "--run-name", "stopped", "--checkpoint-every", "100"]
    process = subprocess.Popen([str(w) for w in words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    file = tmp_path / "stopped" / "metrics.jsonl"
    while not (file.is_file() and file.read_text()) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "go on with --resume --run-name stopped" in error and "Traceback" not in error
    assert (tmp_path / "stopped" / "checkpoints" / f"step-{metrics(tmp_path / 'stopped')[-1]['step']:08d}").is_dir()


def test_weight_zero_computes_no_equivariance_views():
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    config = TrainConfig(batch_size=8, equiv_splits=2, equivariant_batch_size=4)
    views = make_views(images, config, augment.Recipe(), 0, 0, 1)
    assert [len(v) for v in views] == [16, 8]
    plain = make_views(images, TrainConfig(batch_size=8, weight=0), augment.Recipe(), 0, 0, 1)
    assert len(plain) == 1 and torch.equal(plain[0], views[0])  # and the same contrastive views in both arms
    shared = TrainConfig(batch_size=8, equiv_splits=2, views="shared")
    assert len(make_views(images, shared, augment.Recipe(), 0, 0, 1)) == 1


def test_shared_views_are_drawn_per_group_in_part_of_the_batch_and_per_image_in_the_rest():
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(16, -1, -1, -1)
    config = TrainConfig(batch_size=16, equiv_splits=2, equivariant_batch_size=8, views="shared")
    recipe = augment.Recipe(jitter_p=1.0)
    (views,) = make_views(images, config, recipe, 0, 0, 1)
    for view in views.chunk(2):
        kinds = [view[0::2][:4], view[0::2][4:]]
        assert all(torch.allclose(k, k[:1].expand_as(k), atol=1e-6) for k in kinds) and not torch.allclose(kinds[0], kinds[1])
        assert len(view.flatten(1).round(decimals=3).unique(dim=0)) == 8 + 2
    halves = [make_views(images[:8], config, recipe, 0, rank, 2)[0].chunk(2) for rank in (0, 1)]
    torch.testing.assert_close(views, torch.cat([torch.cat(pair) for pair in zip(*halves, strict=True)]))
    cutter = Cutter(config, replace(recipe, flip=0.0), 1.0)
    picture = Image.fromarray(torch.randint(0, 256, (60, 50, 3), dtype=torch.uint8).numpy())
    crops = [cutter(picture, 0, place)[0][0].tobytes() for place in range(16)]
    assert len(set(crops[0::2][:4])) == len(set(crops[0::2][4:])) == 1 and len(set(crops)) == 10


def test_one_draw_per_batch_as_the_public_code_does():
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(8, -1, -1, -1)
    config = TrainConfig(batch_size=8, equiv_splits=2, augmentation_scope="batch")
    view = make_views(images, config, augment.Recipe(), 0, 0, 1)[1][:8]
    torch.testing.assert_close(view, view[:1].expand_as(view))


def test_every_image_is_seen_once_an_epoch_by_one_process():
    config = TrainConfig(batch_size=8, epochs=2, equiv_splits=2)
    plan = Plan.of(config, 40)
    seen = [torch.cat(list(order(config, plan, 40, 0, rank, 2))) for rank in (0, 1)]
    first = torch.cat([s[:20] for s in seen])
    assert sorted(first.tolist()) == list(range(40))
    resumed = torch.cat(list(order(config, plan, 40, 7, 1, 2)))
    assert torch.equal(resumed, seen[1][7 * 4 :])


def test_learning_rate_schedule():
    rates = [lr_at(s, 100, 10, 1.0, "cosine") for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1 and rates[55] == pytest.approx(0.5) and rates[99] < 0.001
    assert lr_at(99, 100, 0, 0.3, "constant") == 0.3


def test_lambda_grows_and_then_stays(tiny_run):
    assert [weight_at(s, 4, 2.0) for s in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0] and weight_at(0, 0, 0.3) == 0.3
    weights = [r["weight"] for r in metrics(tiny_run) if "loss" in r]
    step = TrainConfig.weight / (TrainConfig.weight_warmup_epochs * (5000 // 16))
    assert weights == pytest.approx([step * k for k in range(1, 7)])


def test_gradient_accumulation_averages_micro_batches(tmp_path):
    printed = train_here(tmp_path, "--max-steps", "2", "--gradient-accumulation", "3", "--run-name", "a")
    assert "average of 3 independent micro-batches" in printed and len(metrics(tmp_path / "a")) == 2


def test_class_folders_with_a_broken_picture(photos, tmp_path):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    Image.open(root / "train/warm/00.png").convert("L").save(root / "train/warm/grey.png")
    Image.open(root / "train/warm/01.png").convert("RGBA").save(root / "train/warm/alpha.png")
    Image.open(root / "train/warm/02.png").convert("CMYK").save(root / "train/warm/press.jpg")
    broken = root / "train/cold/broken.jpg"
    Image.open(root / "train/cold/00.png").resize((400, 400)).save(broken)
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    flags = ("--dataset-name", "imagefolder", "--data-root", root, "--image-size", "32", "--max-steps", "2")
    error = refusal("--save-root", tmp_path, *TINY, *flags, "--run-name", "a")
    assert "broken.jpg" in error and "--skip-broken-images" in error
    printed = train_here(tmp_path, *flags, "--run-name", "b", "--skip-broken-images")
    assert "skipped 1 broken pictures" in printed and "broken.jpg" in printed and "51 images" in printed


def test_real_cifar10_trains(shared, tmp_path):
    root = shared("data/cifar10")
    printed = train_here(tmp_path, "--dataset-name", "cifar10", "--data-root", root, "--max-steps", "2", "--run-name", "c")
    assert "50,000 images at 32 px" in printed
    labels = json.loads((tmp_path / "c" / "export" / "config.json").read_text())["care"]["mean"]
    assert labels == [0.4914, 0.4822, 0.4465]


def test_accelerate_launch_uses_all_cores(tmp_path):
    done = train(tmp_path, "--dry-run", launcher=("python", "-m", "accelerate.commands.launch"))
    assert f"CPU, {torch.get_num_threads()} threads" in done.stdout or "cuda" in done.stdout.lower()
    assert not list(tmp_path.iterdir())


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 3\nbatch-size: 64\njitter: [0.1, 0.2, 0.3, 0.4]\n")
    config = cli.resolve({"epochs": 7}, str(file))
    assert (config.epochs, config.batch_size, config.jitter, config.lr) == (7, 64, (0.1, 0.2, 0.3, 0.4), TrainConfig.lr)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--dataset-name", "cifra10"], "did you mean 'cifar10'"),
        (["--dataset-name", "cifar10", "--data-root", "/nowhere"], "'/nowhere' is not a folder"),
        (["--dataset-name", "imagefolder"], "needs --data-root"),
        (["--batch-size", "100", "--equiv-splits", "16"], "the nearest that works is 20"),
        (["--batch-size", "64", "--equivariant-batch-size", "24"], "nearest that does is 16"),
        (["--batch-size", "6000", "--weight", "0"], "fewer than the 6000"),
        (["--epochs", "0"], "--epochs must be positive"),
        (["--model", "resnet18_cifer"], "did you mean 'resnet18_cifar'"),
        (["--weight", "0", "--loss-subtype", "none"], "no loss at all"),
        (["--resume"], "--resume needs --run-name"),
        (["--resume", "--run-name", "absent"], "no run to resume"),
        (["--config", "absent.yaml"], "can't be read"),
        (["--mixed-precision", "fp61"], "fp16"),
    ],
)
def test_what_a_person_gets_wrong_ends_in_one_sentence(flags, sentence, tmp_path):
    assert sentence in refusal(*flags, "--save-root", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_bad_configuration_files(tmp_path):
    file = tmp_path / "c.yaml"
    for text, sentence in [("epoch: 3", "did you mean 'epochs'"), ("- 1", "must be a mapping"), ("a: [", "not valid YAML")]:
        file.write_text(text)
        assert sentence in refusal("--config", str(file))
    file.write_text("epochs: many")
    assert "wrong kind" in refusal("--config", str(file))


def test_an_existing_run_is_not_overwritten_and_resume_changes_nothing(tiny_run):
    root = str(tiny_run.parent)
    before = (tiny_run / "results.json").read_bytes()
    small = [*TINY, "--max-steps", "6"]
    assert "exists" in refusal("--save-root", root, "--run-name", "tiny", *small)
    assert "--lr was 0.2 in this run" in refusal("--save-root", root, "--run-name", "tiny", "--resume", "--lr", "0.5")
    assert (tiny_run / "results.json").read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "tiny")
    config = tmp_path / "tiny" / "config.yaml"
    config.write_text(config.read_text().replace("projection_dim: 16", "projection_dim: 8"))
    assert "does not fit its architecture" in refusal("--save-root", str(tmp_path), "--run-name", "tiny", "--resume")


def test_processes_that_do_not_divide_the_batch():
    with pytest.raises(CareHubError, match="--equiv-splits 4 does not divide among 3 processes; the nearest that does is 3"):
        TrainConfig(batch_size=48, equiv_splits=4).check_processes(3)


def test_export_holds_what_the_checkpoint_holds(tiny_run):
    stored = load_file(tiny_run / "checkpoints" / "step-00000006" / "model.safetensors")
    encoder = care_hub.Encoder.from_pretrained(tiny_run)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, stored[f"encoder.{name}"])


def test_tensorboard_tracker(tmp_path):
    pytest.importorskip("tensorboard")
    train_here(tmp_path, "--max-steps", "2", "--log-with", "tensorboard", "--run-name", "t")
    assert list((tmp_path / "t").rglob("events.out.tfevents*"))


def test_import_and_help_are_light():
    code = "import sys, care_hub, care_hub.cli; assert not {'torch', 'timm', 'datasets'} & set(sys.modules)"
    run("python", "-c", code)
    for words in (["--help"], ["embed", "--help"]):
        assert "Usage" in run("python", "-c", "from care_hub.cli import main; main()", *words).stdout


def test_a_checkpoint_that_can_not_be_written_ends_in_a_sentence(tmp_path):
    writer = checkpoint.Writer(tmp_path / "file" / "checkpoints")
    (tmp_path / "file").write_text("no folder")
    writer.save(3, {"w": torch.zeros(1)}, {"state": {}, "param_groups": []}, {})
    with pytest.raises(CareHubError, match="checkpoint of step 3 can't be written"):
        writer.wait()


def test_a_checkpoint_holds_the_moment_at_which_it_was_asked_for(tmp_path):
    writer, weights = checkpoint.Writer(tmp_path), torch.zeros(3_000_000)
    writer.save(1, {"w": weights}, {"state": {0: {"buffer": weights}}, "param_groups": []}, {})
    weights.fill_(1)  # training goes on
    writer.wait()
    model, optimizer, extra = checkpoint.load(tmp_path)
    assert not model["w"].any() and not optimizer["state"][0]["buffer"].any() and extra["step"] == 1

"""Checkpoints: whole or absent, of the moment at which they were asked for, and never resumed if damaged."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import damage
import pytest
import torch
from helpers import ROOT, TINY, refusal, run_forked
from torch import nn

from care_hub.config import TrainConfig
from care_hub.data.images import InMemoryImages
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.schedule import Plan
from care_hub.training import progress
from care_hub.training import run as run_module
from care_hub.training.checkpoint import CheckpointWriter, load_checkpoint
from care_hub.training.divergence import LARGEST, check_weights, largest_size
from care_hub.training.run import export_run, open_run, restore

NEW = {"seconds": 0.0, "scaler": None}
GO_ON = r"Once it can, resume the run with `resume=True` `run_name='r'` `save_root='.*'`\.$"
ACCELERATOR = SimpleNamespace(
    is_main_process=True,
    num_processes=1,
    mixed_precision="no",
    device=torch.device("cpu"),
    log=lambda row, step: None,
    scaler=None,
    unwrap_model=lambda module: module,
)


def trained(steps: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model and its optimizer after so many steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(folder, *steps: int) -> None:
    """Checkpoints of `trained` in a run folder."""
    writer = CheckpointWriter(folder / "checkpoints")
    for step in steps:
        model, optimizer = trained(step)
        writer.save(step, model.state_dict(), optimizer.state_dict(), NEW | {"seconds": 1.5})
    writer.wait()


def saved(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_checkpoint_that_can_not_be_written_is_told_at_once(tmp_path):
    (tmp_path / "r").write_text("no folder")
    writer = CheckpointWriter(tmp_path / "r" / "checkpoints")
    writer.save(3, {"w": torch.zeros(1)}, {"state": {}, "param_groups": []}, {})
    while not writer.failed:
        time.sleep(0.001)
    with pytest.raises(CareHubError, match=f"checkpoint of step 3 can't be written: .*{GO_ON}"):
        writer.wait()
    assert not writer.failed


def test_a_checkpoint_holds_the_moment_at_which_it_was_asked_for(tmp_path):
    writer, weights = CheckpointWriter(tmp_path), torch.zeros(3_000_000)
    writer.save(1, {"w": weights}, {"state": {0: {"buffer": weights}}, "param_groups": []}, NEW)
    weights.fill_(1)  # training goes on
    writer.wait()
    model, optimizer, extra = load_checkpoint(tmp_path / "step-00000001")
    assert not model["w"].any() and not optimizer["state"][0]["buffer"].any() and extra["step"] == 1


def test_two_checkpoints_are_retained_and_none_that_a_resumed_run_has_passed_over(tmp_path):
    save(tmp_path, 2, 4, 6)
    assert saved(tmp_path) == ["step-00000004", "step-00000006"]
    save(tmp_path, 5)
    assert saved(tmp_path) == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("name", damage.CHECKPOINTS)
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one_and_both_are_named(name, tmp_path, caplog):
    save(tmp_path, 2, 4)
    damage.CHECKPOINTS[name](tmp_path / "checkpoints" / "step-00000004")
    model, optimizer = trained()
    assert restore(tmp_path, model, optimizer, ACCELERATOR) == (2, 1.5)
    (warning,) = caplog.messages
    assert "step-00000004'" in warning and warning.endswith("step-00000002' instead.")
    for value, expected in zip(model.state_dict().values(), trained(2)[0].state_dict().values(), strict=True):
        assert torch.equal(value, expected)
    save(tmp_path, 4)  # in the place of the damaged one
    assert restore(tmp_path, model, optimizer, ACCELERATOR) == (4, 1.5)


def test_where_all_checkpoints_are_damaged_each_is_named(tmp_path):
    save(tmp_path, 2, 4)
    for path in (tmp_path / "checkpoints").iterdir():
        damage.flip("model.safetensors", 0.9)(path)
    with pytest.raises(CareHubError, match=r"step-00000004' is damaged.*step-00000002' is damaged"):
        restore(tmp_path, *trained(), ACCELERATOR)


@pytest.mark.parametrize("name", damage.METRICS)
def test_damaged_metrics_never_stop_a_resume(name, tmp_path, caplog):
    rows = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3, 4)]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(damage.METRICS[name]("".join(f"{row}\n" for row in rows).encode()))
    progress.Progress(tmp_path, Plan.of(TrainConfig(), 640), 3, 0.0, TrainConfig(), ACCELERATOR).close()
    left = path.read_text().splitlines()
    assert left == [row for row in rows[:3] if row in left]
    assert bool(caplog.messages) == (name not in ("a last line cut short", "empty"))


def test_a_full_disk_is_a_sentence_with_the_command_to_go_on(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    (tmp_path / "r").mkdir()
    plan = Plan.of(TrainConfig(), 640)
    writing = progress.Progress(tmp_path / "r", plan, 0, 0.0, TrainConfig(), ACCELERATOR)
    writing.file = SimpleNamespace(write=full, close=full)
    writing.add_losses({"loss": torch.tensor(1.0)})
    with pytest.raises(CareHubError, match=rf"metrics.jsonl' can't be written \(No space left.*{GO_ON}"):
        writing.add_step(0, 0.1, 0.1, 1.0)
    writing.release()
    encoder = Encoder.new("resnet10_w16_small", hidden=8, outputs=4)
    monkeypatch.setattr(run_module, "plot_neighbors", full)
    images = InMemoryImages(32, None, None, torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(CareHubError, match=rf"r' can't be written \(No space left on device\)\. {GO_ON}"):
        export_run(tmp_path / "r", TrainConfig(), encoder, images, {}, {})


def test_a_run_is_locked_until_its_process_ends_however_it_does(tmp_path):
    config = TrainConfig(save_root=str(tmp_path), run_name="r")
    with open_run(config) as folder:
        pass
    for left in (folder / ".writing-1", folder / "checkpoints" / ".writing-2"):  # as by a kill
        left.mkdir(parents=True)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, 2); print(flush=True); input()"
    words = [sys.executable, "-c", hold, folder / ".lock"]
    config.resume = True
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with (
            pytest.raises(CareHubError, match=r"in use by process \d+ on .*; wait for it or stop it"),
            open_run(config),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
    with open_run(config):
        assert not list(folder.rglob(".writing-*"))


def test_weights_that_are_not_finite_or_too_large_are_no_training(tmp_path):
    config = TrainConfig(lr=50.0)
    check_weights(*trained(2), 2, config)
    for value, words in (
        (float("nan"), "no longer finite"),
        (float("inf"), "no longer finite"),
        (99, "square of"),
    ):
        places = [lambda model, optimizer: model[0].weight.data]
        if words == "no longer finite":
            places += [
                lambda model, optimizer: model[1].running_var,
                lambda model, optimizer: optimizer.state[model[0].weight]["momentum_buffer"],
            ]
        for place in places:
            model, optimizer = trained(2)
            place(model, optimizer).view(-1)[0] = value
            with pytest.raises(
                CareHubError, match=f"diverged: at step 2 its weights .*{words}.*`lr`, which is 50"
            ):
                check_weights(model, optimizer, 2, config)


def test_weights_that_begin_large_or_are_not_trained_are_no_divergence():
    model, optimizer = trained(2)
    model[0].weight.data.fill_(50)
    check_weights(model, optimizer, 2, TrainConfig(), largest_size(model))
    assert largest_size(trained(2)[0]) == LARGEST
    model[0].requires_grad_(False)
    check_weights(model, optimizer, 2, TrainConfig())


def test_a_run_that_diverges_leaves_no_checkpoint_and_no_export(photos, tmp_path):
    data = ("--dataset-name", "imagefolder", "--data-root", photos, "--image-size", "32", "--run-name", "r")
    said = refusal("--save-root", tmp_path, *TINY, *data, "--max-steps", "1", "--lr", "1e30")
    assert "\nError: Training diverged: at step 1 " in said and "lower --lr, which is 1e+30" in said
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.launches
def test_killed_in_training_a_checkpoint_and_the_export_a_resumed_run_is_the_same_to_the_bit():
    assert run_forked(ROOT / "tests" / "campaigns" / "kills.py", 1, 1).stdout.endswith("4 / 4\n")

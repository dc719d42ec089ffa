"""Runs that are asked to stop, and start again by the same command."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
from campaigns import signals
from click.testing import CliRunner
from helpers import IMAGES, ROOT, TINY, command, metrics, refusal
from PIL import Image

from care_hub import cli
from care_hub.config import TrainConfig
from care_hub.data.images import StreamedImages
from care_hub.training import preemption
from care_hub.training.preemption import Preempted, Preemption
from care_hub.training.progress import Progress

STEPS = ("--max-steps", "6", "--checkpoint-every", "100", "--run-name", "r", "--resume", "auto")


@pytest.fixture
def place(tmp_path) -> tuple:
    """Where runs go, and a data set that is read at once."""
    return ("--save-root", tmp_path / "runs", *signals.small_images(tmp_path / "data"))


def checkpoints(place) -> list[str]:
    return sorted(path.name for path in (place[1] / "r" / "checkpoints").glob("step-*"))


def test_one_command_starts_a_run_resumes_it_and_leaves_it_alone_when_it_is_finished(place, monkeypatch):
    add_step = Progress.add_step

    def interrupted(self, step, *arguments):
        add_step(self, step, *arguments)
        if step == 3:
            os.kill(os.getpid(), signal.SIGUSR2)

    words = [str(word) for word in (*place, *TINY, *STEPS, "--preempt-signal", "SIGUSR2")]
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "add_step", interrupted)
        before = signal.getsignal(signal.SIGUSR2)
        done = CliRunner().invoke(cli.train, words)
    assert done.exit_code == 75 and signal.getsignal(signal.SIGUSR2) == before
    last = metrics(place[1] / "r")[-1]["step"]
    assert 4 <= last <= 5 and checkpoints(place) == [f"step-{last:08d}"]
    assert (
        f"Stopped at step {last} of 6; resume it with --resume --run-name r --save-root {place[1]}."
        in done.output
    )

    assert "--lr was 0.2 in this run" in refusal(*words, "--lr", "0.5")
    assert "Trained" in command(cli.train, *words)
    assert [row["step"] for row in metrics(place[1] / "r")] == [1, 2, 3, 4, 5, 6]
    config = place[1] / "r" / "export" / "config.json"
    config.write_text(config.read_text().replace('"flip": 0.5,', ""))  # as a version without the option
    again = command(cli.train, *words)
    assert "r' is finished" in again and "Trained" not in again
    (place[1] / "r" / "export" / "README.md").unlink()  # as if it were killed before its last file
    assert "Trained" in command(cli.train, *words) and len(metrics(place[1] / "r")) == 6


def test_a_run_that_was_killed_before_its_first_checkpoint_is_started_again(place):
    run = place[1] / "r"
    run.mkdir(parents=True)
    words = (*place, *TINY, *STEPS, "--max-steps", "3", "--checkpoint-minutes", "1e-9")
    command(cli.train, *words)
    assert checkpoints(place) == ["step-00000002", "step-00000003"]  # by time
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "export")
    assert "no complete checkpoint" in refusal(*words, "--resume")
    command(cli.train, *words)
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
    (run / "config.yaml").unlink()
    shutil.rmtree(run / "export")
    assert "exists; choose another" in refusal(*words)


def test_resume_is_true_false_or_auto(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("{resume: Auto, run_name: r}")
    assert cli.resolve({"save_root": tmp_path}, file).resume == "auto"
    assert (
        TrainConfig(resume="yes", run_name="r").resume is True and TrainConfig(resume=False).resume is False
    )
    assert "--resume must be true or false, or auto, got 'maybe'" in refusal("--resume", "maybe")
    assert "--resume needs --run-name" in refusal("--resume", "auto")
    assert "did you mean 'sigusr2'" in refusal("--preempt-signal", "usr2")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_noted_and_ends_at_once_what_is_saved(number):
    with Preemption("sigusr1") as asked:
        assert not asked.asked()
        os.kill(os.getpid(), number)
        assert asked.asked()
        with pytest.raises(Preempted, match="saved"):
            asked.raise_from_now_on(Preempted("saved"))
    with pytest.raises(Preempted, match="saved"), Preemption("sigusr1") as asked:
        asked.raise_from_now_on(Preempted("saved"))
        with suppress(Exception):  # as the decoders of images do
            os.kill(os.getpid(), number)


def test_the_end_of_the_launcher_is_noted(monkeypatch):
    assert not Preemption("sigusr1").asked()
    monkeypatch.setattr(preemption, "LAUNCHER", 10**9)
    assert Preemption("sigusr1").asked()


def parent_of_python(*words: str) -> bool:
    """Whether a child of a process with these words takes it for a launcher."""
    code = "from care_hub.training.preemption import LAUNCHER; print(LAUNCHER)"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[-1]])"
    done = subprocess.run(
        [sys.executable, "-c", parent, *words, code], capture_output=True, text=True, cwd=ROOT
    )
    assert not done.stderr
    return done.stdout.strip() != "None"


@pytest.mark.launches
def test_a_launcher_is_known_by_its_command_line():
    assert parent_of_python("/usr/bin/accelerate", "launch")
    assert not parent_of_python("train_with_accelerate.py")


TWICE = """
import os, signal
from care_hub.training.preemption import Preemption
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with Preemption("sigusr1") as preemption:
    os.kill(os.getpid(), signal.SIGHUP)
    print(preemption.asked(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print(preemption.asked(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("alive")
"""


@pytest.mark.parametrize(
    ("environment", "status", "printed"),
    [
        ({}, -signal.SIGTERM, "False True"),
        ({"TORCHELASTIC_RUN_ID": "1"}, 0, "True True alive"),  # it may pass on what its processes have got
    ],
)
def test_a_second_signal_ends_the_process_and_nohup_holds(environment, status, printed):
    words, env = [sys.executable, "-c", TWICE], os.environ | environment
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env)
    assert (done.returncode, " ".join(done.stdout.split())) == (status, printed), done.stderr


@pytest.mark.launches
def test_loader_processes_survive_what_their_parent_survives(tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "0.png")
    rows = [{"image": {"bytes": (tmp_path / "0.png").read_bytes(), "path": None}}]
    images = StreamedImages(32, None, None, rows, workers=1)
    import torch

    batches = images.batches([torch.tensor([0])] * 40)
    next(batches)
    (worker,) = torch.multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True)  # not by its parent
    assert len(list(batches)) == 39
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.slow
def test_processes_save_the_same_step_when_one_is_asked(tmp_path):
    data = signals.small_images(tmp_path / "data")
    problem, _ = signals.attempt(tmp_path, "torchrun", signal.SIGUSR1, "rank", *data)
    assert not problem, (tmp_path / "output").read_text()[-3000:]


@pytest.mark.slow
def test_all_signals():
    assert signals.main() == 0


STAND_INS = {
    "scontrol": 'case $1 in show) printf "here\\nthere\\n" ;; *) echo "$@" >>requeued ;; esac',
    "srun": """export SLURM_STEP_ID=0 SLURM_NTASKS=2
        for k in 0 1; do SLURM_PROCID=$k SLURM_LOCALID=$k "$@" || worst=$?; done
        exit ${worst:-0}""",
    "python": 'echo "$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR:$MASTER_PORT $*" >>started; exit "$STATUS"',
}


@pytest.mark.parametrize("status", [0, 1, 75])
def test_slurm_requeues_what_is_to_be_resumed(tmp_path, status):
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "STATUS": str(status), "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "x"}
    script = ROOT / "care_hub" / "recipes" / "slurm.sh"
    words = ["bash", str(script), "a b.yaml", "--lr", "1"]
    assert subprocess.run(words, env=os.environ | environment, cwd=tmp_path).returncode == status
    flags = "-m care_hub train --config a b.yaml --run-name slurm-12345 --resume auto --lr 1"
    started = (tmp_path / "started").read_text().splitlines()
    assert started == [f"{k}/2 {k} here:22345 {flags}" for k in (0, 1)]
    assert (tmp_path / "requeued").is_file() == (status == 75)
    header = script.read_text()
    assert "#SBATCH --signal=USR1@" in header and "#SBATCH --requeue" in header

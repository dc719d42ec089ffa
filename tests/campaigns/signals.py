"""Signals to training runs: each ends with its last step saved. `python tests/campaigns/signals.py WORDS...`

One line per attempt (of those that contain all WORDS), then survived / tried; exit status 1 if any failed.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import IMAGES, ROOT, TINY, TORCHRUN, metrics
from PIL import Image

LAUNCHERS = {
    "python": ("python",),
    "accelerate": ("python", "-m", "accelerate.commands.launch"),
    "torchrun": TORCHRUN,
}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CASES = [
    *(("python", number, "process") for number in SIGNALS),
    *((name, n, to) for name in ("accelerate", "torchrun") for n in SIGNALS for to in ("launcher", "group")),
    *(("torchrun", number, "rank") for number in (signal.SIGTERM, signal.SIGUSR1)),
]
GRACE = 10.0  # seconds in which the step has to be saved
FOREVER = ("--epochs", "100000", "--knn-every", "0", "--checkpoint-every", "1000000")


def small_images(folder: Path) -> tuple[str, ...]:
    """The options of a data set that is read at once."""
    (folder / "class").mkdir(parents=True)
    for k in range(16):
        Image.fromarray(IMAGES[k % 3]).save(folder / "class" / f"{k}.png")
    return "--dataset-name", "imagefolder", "--data-root", str(folder), "--image-size", "32"


def start(root: Path, launcher: str, *flags: str, **environment: str) -> subprocess.Popen:
    """train.py under a launcher, as the first process of a group of its own."""
    words = [*LAUNCHERS[launcher], ROOT / "train.py", "--save-root", root, *TINY, *FOREVER, *flags]
    words = [sys.executable if word == "python" else str(word) for word in words]
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    with open(root / "output", "a") as output:
        settings = {"stdout": output, "stderr": output, "start_new_session": True}
        return subprocess.Popen(words, env=os.environ | environment, **settings)


def wait_for_steps(run: Path, process: subprocess.Popen, steps: int = 3) -> None:
    """Until so many steps more are in metrics.jsonl than now."""
    file = run / "metrics.jsonl"
    before = len(file.read_text().splitlines()) if file.is_file() else 0
    while not file.is_file() or len(file.read_text().splitlines()) < before + steps:
        assert process.poll() is None, (run.parent / "output").read_text()[-3000:]
        time.sleep(0.02)


def attempt(root: Path, launcher: str, number: signal.Signals, to: str, *flags: str) -> tuple[str, float]:
    """(what went wrong, seconds from the signal to the saved step)."""
    run = root / "r"
    process = start(root, launcher, *flags, "--run-name", "r")
    wait_for_steps(run, process)
    first = psutil.Process(process.pid)
    everyone = [first, *first.children(recursive=True)]
    ranks = [p for p in everyone if p.is_running() and str(ROOT / "train.py") in p.cmdline()[1:3]]
    began = time.monotonic()
    for receiver in {"group": everyone, "rank": ranks[-1:]}.get(to, [first]):
        receiver.send_signal(number)
    checkpoints = run / "checkpoints"
    while not (saved := sorted(checkpoints.glob("step-*"))) and time.monotonic() < began + 6 * GRACE:
        time.sleep(0.02)
    seconds = time.monotonic() - began
    process.wait(60)
    left = psutil.wait_procs(everyone[1:], timeout=60)[1]
    for orphan in left:
        orphan.kill()
    said, rows = (root / "output").read_text(), [row["step"] for row in metrics(run)]
    problems = {
        "processes are left": left,
        "slower than the grace": seconds > GRACE,
        "the last step is not saved": [path.name for path in saved[-1:]] != [f"step-{rows[-1]:08d}"],
        "no word of it": f"Stopped at step {rows[-1]} of" not in said,
        "a traceback": f'File "{ROOT}' in said,  # launchers show some of their own
        f"exit status {process.returncode}": launcher == "python" and process.returncode != 75,
    }
    return ", ".join(problem for problem, found in problems.items() if found), seconds


def main(*words: str) -> int:
    """The exit status."""
    tried = survived = 0
    for launcher, number, to in CASES:
        name = f"{launcher:10} {number.name:7} to {to}"
        if all(word in name for word in words):
            with tempfile.TemporaryDirectory() as folder:
                data = small_images(Path(folder) / "data")
                problem, seconds = attempt(Path(folder), launcher, number, to, *data)
                if problem:
                    print((Path(folder) / "output").read_text()[-3000:])
            tried, survived = tried + 1, survived + (not problem)
            print(f"{name:30} {seconds:5.1f} s  {problem or 'saved'}", flush=True)
    print(f"{survived} / {tried}")
    return int(survived < tried)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

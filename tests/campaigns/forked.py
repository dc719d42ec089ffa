"""Trainings in forked processes, to which something happens at their n-th event; shared by the campaigns."""

import io
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401  once, before processes are forked
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from helpers import TINY
from processes import free_port

from care_hub import cli
from care_hub.config import TrainConfig
from care_hub.data.sources import load_splits
from care_hub.training import trainer
from care_hub.training.progress import Progress

METHODS = {
    "SimCLR": ("--weight", "0"),
    "CARE, shared views": ("--views", "shared"),
    "CARE, steering head": ("--steering-head",),
    "MoCo": ("--method", "moco", "--queue-size", "32"),
}
STEPS = ("--max-steps", "6", "--checkpoint-every", "2", "--warmup-epochs", "0", "--weight-warmup-epochs", "0")
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


@dataclass
class Ended:
    """How a training ended."""

    status: int  # exit status, or minus the signal
    output: str
    events: list[str]

    @property
    def told(self) -> bool:
        """Whether it ended in a sentence on a line of its own, or well."""
        lines = [line for line in self.output.splitlines() if line.startswith("Error: ")]
        return "Traceback" not in self.output and len(lines) == (self.status != 0)


class Table:
    """Rows that a campaign prints, and its last line."""

    def __init__(self) -> None:
        self.survived: list[bool] = []

    def add(self, survived: bool, *cells: str) -> None:
        """A row for an attempt."""
        self.survived.append(survived)
        print("survived" if survived else "FAILED", *cells, sep=" | ", flush=True)

    def end(self) -> int:
        """The exit status."""
        print(f"{sum(self.survived)} / {len(self.survived)}")
        return int(not all(self.survived))


def prepare(folder: Path) -> tuple[str, ...]:
    """Noise as class folders below `folder`, read once for all trainings; the options that name them."""
    torch.set_num_threads(1)  # before anything is computed: threads don't survive a fork
    random = np.random.RandomState(0)
    for name in ("a", "b"):
        (folder / "data" / name).mkdir(parents=True)
        for k in range(32):
            pixels = random.randint(0, 256, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "data" / name / f"{k}.png")
    data = {"dataset_name": "imagefolder", "data_root": str(folder / "data"), "image_size": 16}
    splits = load_splits(TrainConfig(**data), size=16, progress=False)
    trainer.load_splits = lambda *_, **__: splits
    names = zip(("--dataset-name", "--data-root", "--image-size"), map(str, data.values()), strict=True)
    return tuple(word for pair in names for word in pair)


def train_forked(
    words: tuple, action: Callable[[int, str], None] | None = None, processes: int = 1, rank: int = 0
) -> Ended:
    """`train.py words` with a tiny network, in so many processes.

    In that of `rank`, `action(n, event)` is called at every step of training and change of a file of the run.
    If one process dies, the others are killed, as a launcher does.
    """
    read, write = os.pipe()
    notes, port = tempfile.TemporaryFile("a+"), free_port()  # noqa: SIM115
    members = {}
    for number in range(processes):
        if (pid := os.fork()) == 0:
            os.close(read)
            os.dup2(write, 1)
            os.dup2(write, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
            if processes > 1:
                about = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": processes}
                about |= {"LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in about.items()}
            os._exit(_member([*TINY, *map(str, words)], action if number == rank else None, notes))
        members[pid] = number
    os.close(write)
    output = io.BytesIO()
    reader = threading.Thread(target=lambda: output.write(os.fdopen(read, "rb").read()))
    reader.start()
    status = 0
    while members:
        pid, how = os.wait()
        del members[pid]
        status = status or os.waitstatus_to_exitcode(how)
        if how:
            for other in members:
                os.kill(other, signal.SIGKILL)
    reader.join()
    notes.seek(0)
    return Ended(status, output.getvalue().decode(errors="replace"), notes.read().splitlines())


def _member(words: list[str], action: Callable[[int, str], None] | None, notes: io.TextIOBase) -> int:
    root, count, inside = words[words.index("--save-root") + 1], 0, threading.local()

    def event(text: str) -> None:
        nonlocal count
        count += 1
        inside.action = True
        with suppress(OSError):  # where no file may be written any more
            os.write(notes.fileno(), f"{text}\n".encode())
        action(count, text)
        inside.action = False

    def audit(name: str, arguments: tuple) -> None:
        opened = name == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wa+x")
        if (opened or name in WRITES) and not getattr(inside, "action", False):
            path = str(arguments[1] if name == "os.rename" else arguments[0])
            if path.startswith(root):
                event(f"{name.rpartition('.')[2]} {os.path.relpath(path, root).partition('/')[2]}")

    if action:
        sys.addaudithook(audit)
        add_step = Progress.add_step

        def step(self: Progress, number: int, *arguments: float) -> None:
            event(f"train step {number + 1}")
            add_step(self, number, *arguments)

        Progress.add_step = step
    try:
        cli.train.main(words, prog_name="train.py")
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0

"""Full disks and read-only folders: a sentence at once, whose command goes on to the same end.

`python tests/campaigns/disks.py`: as root on a small file system of its own; for others no file may grow.
"""

import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from forked import METHODS, Table, prepare, train_forked
from kills import content

ROOT, NOBODY, EVERY = os.geteuid() == 0, 65534, 40
STEPS = ("--epochs", "30", "--max-steps", str(3 * EVERY), "--checkpoint-every", str(EVERY))


def fill(disk: Path) -> None:
    """Leave no space, or, without a file system of one's own, no right to write."""
    if not os.path.ismount(disk):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return
    with suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


def close(folder: Path) -> None:
    """Make a folder read-only; for root too, who becomes another user."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o555)


def at(pattern: str, which: int, change: Callable[[], None]) -> Callable[[int, str], None]:
    """An action that changes the disk at the so many-th event that matches; of another user than root."""
    seen = 0

    def action(count: int, event: str) -> None:
        nonlocal seen
        if count == 1 and ROOT:
            os.seteuid(NOBODY)
        if re.match(pattern, event):
            seen += 1
            if seen == which:
                change()
                action.event = event

    return action


def steps_after(events: list[str], pattern: str, which: int) -> int:
    """Steps of training after an event."""
    place = [k for k, event in enumerate(events) if re.match(pattern, event)][which - 1]
    return sum(event.startswith("train") for event in events[place + 1 :])


def cases(run: Path) -> dict[str, tuple[str, int, Callable[[], None]]]:
    """What happens -> at which event, and what is done then."""
    disk = run.parent
    return {
        "full in a checkpoint": ("mkdir checkpoints/.writing", 2, lambda: fill(disk)),
        "full in metrics.jsonl": ("train step 45", 1, lambda: fill(disk)),
        "full in the export": ("mkdir export", 1, lambda: fill(disk)),
        "full in the export's figure": ("rename export/config.json", 1, lambda: fill(disk)),
        "read-only checkpoints": ("train step 45", 1, lambda: close(run / "checkpoints")),
        "read-only export": ("train step 119", 1, lambda: close(run / "export")),
    }


def repaired(run: Path) -> None:
    """Free space, and let all be written again."""
    (run.parent / "filler").unlink(missing_ok=True)
    for path in (run, *run.iterdir()):
        if path.is_dir():
            path.chmod(0o777)


def goes_on(output: str, root: Path, expected: list) -> bool:
    """Whether the command in the last sentence resumes the run, to the expected end."""
    command = re.search(r"resume the run with (--.*)\.$", output.strip().splitlines()[-1])
    again = train_forked(tuple(shlex.split(command[1])) if command else ())
    return again.status == 0 and content(root / "run") == expected


def main() -> int:
    """The exit status."""
    table = Table()
    with tempfile.TemporaryDirectory() as name:
        root, disk = Path(name), Path(name) / "disk"
        root.chmod(0o755)
        disk.mkdir()
        own = ROOT and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", disk]).returncode
        disk.chmod(0o777)
        try:
            words = (*prepare(root), *STEPS, *METHODS["SimCLR"], "--save-root")
            assert train_forked((*words, root, "--run-name", "whole")).status == 0
            expected = content(root / "whole")
            for title, (pattern, which, change) in cases(disk / "run").items():
                ended = train_forked((*words, disk, "--run-name", "run"), at(pattern, which, change))
                said, late = ended.output.strip().splitlines()[-1], steps_after(ended.events, pattern, which)
                repaired(disk / "run")
                survived = ended.status == 1 and ended.told and late < EVERY
                survived = survived and goes_on(ended.output, disk, expected)
                table.add(survived, title, f"{late} steps later", said)
                shutil.rmtree(disk / "run")
            assert train_forked((*words, disk, "--run-name", "run", "--max-steps", str(EVERY))).status == 0
            if own:
                subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            else:
                (disk / "run").chmod(0o555)
            resume = ("--resume", "--run-name", "run", "--save-root", disk, "--max-steps", str(3 * EVERY))
            ended = train_forked(resume, None if own else at("never", 1, lambda: None))
            if own:
                subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
            repaired(disk / "run")
            again = train_forked(resume)
            survived = ended.status == 1 and ended.told and again.status == 0
            survived = survived and content(disk / "run") == expected
            table.add(
                survived, "read-only when resumed", "0 steps later", ended.output.strip().splitlines()[-1]
            )
        finally:
            if own:
                subprocess.run(["umount", disk], check=True)
    return table.end()


if __name__ == "__main__":
    sys.exit(main())

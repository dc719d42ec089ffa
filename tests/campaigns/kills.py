"""kill -9 in training, in a checkpoint's writing and in the export: a resumed run ends with the same bits.

`python tests/campaigns/kills.py [KILLS [PROCESSES...]]`: so many for each of three methods and each number of
processes (by default 5, on 1 and on 2), spread over all steps of training and all changes of files.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from forked import METHODS, STEPS, Table, prepare, train_forked

TIMES = {"images_per_second", "training_seconds"}


def content(run: Path) -> list:
    """What a run is judged by: its encoder to the bit, and all but the times in results and metrics."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows.append(json.loads((run / "results.json").read_text()))
    files = [(run / "export" / name).read_bytes() for name in ("model.safetensors", "projection.safetensors")]
    return [*files, *({k: v for k, v in row.items() if k not in TIMES} for row in rows)]


def attempt(words: tuple, run: Path, number: int, processes: int, rank: int, expected: list) -> tuple:
    """Kill a run at an event of a process, resume it (or start again if nothing was saved).

    Gives (survived, where it was killed, what happened).
    """

    def kill(count: int, event: str) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    killed = train_forked(words, kill, processes, rank)
    where = f"rank {rank}: {killed.events[-1]}"
    if killed.status != -signal.SIGKILL:
        return False, where, f"ended with {killed.status} before it"
    resumed = bool(list(run.glob("checkpoints/step-*")))
    if not resumed:
        shutil.rmtree(run, ignore_errors=True)
    again = train_forked((*words, "--resume") if resumed else words, None, processes)
    if again.status:
        return False, where, again.output[-300:]
    left = [path.name for path in run.rglob(".writing-*")]
    if content(run) != expected or left:
        return False, where, f"resumed {resumed}, but not the same run; left behind: {left}"
    return True, where, "resumed" if resumed else "started again"


def main(kills: int = 5, *groups: int) -> int:
    """The exit status."""
    table = Table()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data = prepare(root)
        for place, (method, flags) in enumerate(METHODS.items()):
            for processes in groups or (1, 2):
                words = (*data, *STEPS, *flags, "--save-root", root, "--run-name")
                whole = train_forked((*words, "whole"), lambda count, event: None, processes)
                assert whole.status == 0, whole.output[-3000:]
                expected = content(root / "whole")
                steps = sum(event.startswith("train") for event in whole.events)
                for k in range(kills):
                    rank = k % processes
                    total = steps if rank else len(whole.events)  # the main process alone writes
                    number = 1 + int((k + (place + 0.5) / len(METHODS)) * total / kills)
                    row = attempt((*words, "run"), root / "run", number, processes, rank, expected)
                    table.add(row[0], method, f"{processes} processes", *row[1:])
                    shutil.rmtree(root / "run", ignore_errors=True)
                shutil.rmtree(root / "whole")
    return table.end()


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))

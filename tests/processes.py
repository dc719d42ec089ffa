"""Processes forked from one that has imported everything: that takes longer than most of what is tested.

Tests of the launcher itself use torchrun.
"""

import multiprocessing
import os
import runpy
import socket
import sys
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "datasets", "care_hub.cli", "care_hub.training.trainer"])
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def start(folder: Path, function, *arguments) -> BaseProcess:
    """A process that calls `function`; its output goes into the files stdout and stderr of `folder`."""
    with mock.patch.dict(os.environ, OFFLINE):  # which is read at the import
        forkserver.ensure_running()
    process = FORKS.Process(target=_call, args=(folder, os.environ | OFFLINE, function, *arguments))
    process.start()
    return process


def status(process: BaseProcess) -> int | None:
    """How it has ended; None if it had to be killed after minutes."""
    process.join(240)
    ended = process.exitcode
    process.kill()
    return ended


def _call(folder: Path, environment: dict, function, *arguments) -> None:
    os.environ.clear()
    os.environ |= environment
    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(folder / name, "w") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    function(*arguments)


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def member(rank: int, processes: int, port: str, function, *arguments) -> None:
    """One process of the group, told of it and given one thread as torchrun does."""
    torch.set_num_threads(1)
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in here.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    function(*arguments)


def fork(processes: int, function, *arguments) -> None:
    """Call `function` in so many processes that are a group. Raises ProcessExitedException if one fails."""
    forked = torch.multiprocessing.start_processes
    forked(member, (processes, free_port(), function, *arguments), processes, start_method="fork")


def script(*words: str) -> None:
    """`python SCRIPT WORDS...`, or `python -m MODULE WORDS...`."""
    run, name = runpy.run_path, words[0]
    if name == "-m":
        run, words = runpy.run_module, words[1:]
        name = words[0]
    sys.argv = list(words)
    sys.path.insert(0, os.path.dirname(os.path.abspath(name)))
    run(name, run_name="__main__")


def scripts(*words: str) -> None:
    """`script` in two processes that are a group."""
    try:
        fork(2, script, *words)
    except (torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException) as e:
        sys.exit(str(e))

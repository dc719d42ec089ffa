"""Two processes of one group: `two_processes.py SCRIPT WORDS...`, or `-m MODULE WORDS...`.

What torchrun would start, forked from a process that has imported everything, since that takes longer than
most of what is tested. Tests of the launcher itself use torchrun.
"""

import os
import runpy
import socket
import sys

import datasets  # noqa: F401
import torch

import care_hub.cli
import care_hub.training.trainer  # noqa: F401


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
    start = torch.multiprocessing.start_processes
    start(member, (processes, free_port(), function, *arguments), processes, start_method="fork")


def script(words: list[str]) -> None:
    run, name = runpy.run_path, words[0]
    if name == "-m":
        run, words = runpy.run_module, words[1:]
        name = words[0]
    sys.argv = list(words)
    sys.path.insert(0, os.path.dirname(os.path.abspath(name)))
    run(name, run_name="__main__")


if __name__ == "__main__":
    try:
        fork(2, script, sys.argv[1:])
    except (torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException) as e:
        sys.exit(str(e))

"""How the threads of a step should wait for each other: spinning, as GNU OpenMP does, or asleep.

    python benchmarks/threads.py   # on idle cores, and with a busy process beside it on each

Milliseconds of a SimCLR step of resnet10_w16_small on 64 images, the median of all rounds. Policies take
turns, each in a process of its own, so that a noisy machine is noisy for all.
"""

import os
import statistics
import subprocess
import sys
import time

import click

from care_hub.cores import cores

POLICIES = {"spinning": {}, "spinning 10,000 times": {"GOMP_SPINCOUNT": "10000"}}
POLICIES["asleep"] = {"OMP_WAIT_POLICY": "passive"}
BUSY = [sys.executable, "-c", "while True: pass"]


def step_times(steps: int) -> list[float]:
    """Milliseconds of each step, the first two left out."""
    import torch  # which reads the policy

    from care_hub.encoder import Encoder
    from care_hub.losses import info_nce

    encoder, times = Encoder.new("resnet10_w16_small").train(), []
    optimizer = torch.optim.SGD(encoder.parameters(), 0.01, fused=True)
    views = [torch.rand(64, 3, 32, 32).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    for _ in range(steps + 2):
        began = time.perf_counter()
        info_nce(*map(encoder, views), 0.5).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(1000 * (time.perf_counter() - began))
    return times[2:]


@click.command()
@click.option("--steps", default=40, show_default=True, help="of a round")
@click.option("--rounds", default=5, show_default=True)
@click.option("--child", is_flag=True, hidden=True)
def main(steps: int, rounds: int, child: bool) -> None:
    """Compare ways to wait, on idle and on busy cores."""
    if child:
        return click.echo(" ".join(map(str, step_times(steps))))
    environment = os.environ | {"OMP_NUM_THREADS": str(cores())}
    words = [sys.executable, __file__, "--child", "--steps", str(steps)]
    times: dict[str, list[float]] = {}
    for load in ("idle", "busy") * rounds:
        beside = [subprocess.Popen(BUSY) for _ in range(cores() * (load == "busy"))]
        for policy, settings in POLICIES.items():
            printed = subprocess.check_output(words, env=environment | settings, text=True)
            times.setdefault(f"{load}, {policy}", []).extend(map(float, printed.split()))
        for process in beside:
            process.kill()
    for case, values in times.items():
        click.echo(f"{case:<28}{statistics.median(values):8.1f} ms")


if __name__ == "__main__":
    main()

"""Images per second of whole training steps, where their time goes, and how near they come to what the machine can do.

    python benchmarks/throughput.py                                     # resnet18_cifar, batch 64: SimCLR, CARE, shared views, MoCo
    python benchmarks/throughput.py --model resnet50_cifar --batch 1024 --precision bf16 --steps 20 -o results/throughput.json

All cases are stepped in turn in one process, so that a noisy machine is noisy for all; medians. Beside ours: "floor", a bare forward
and backward pass of the network on random data, two views at a time (also all four at once, and in NCHW layout); "published", the
work of the public code's step written plainly (four fp32 forward passes of NCHW views made beforehand, backward, Adam); lightly's
SimCLR step, if it is installed. `other` is the share of a step that is neither forward nor backward pass.
"""

import json
import os
import resource
import statistics
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from care_hub import augment, losses, trainer
from care_hub.config import TrainConfig
from care_hub.distributed import use_all_cores
from care_hub.encoder import Encoder
from care_hub.views import make_views

PHASES = ("data", "augmentation", "forward", "backward", "optimiser", "logging")
CASES = {
    "SimCLR": {"weight": 0.0},
    "CARE": {},
    "CARE, shared views": {"views": "shared"},
    "CARE, half of the batch": {"equivariant_batch_size": 0.5},
    "CARE, half of the batch shared": {"equivariant_batch_size": 0.5, "views": "shared"},
    "MoCo": {"weight": 0.0, "method": "moco"},
}
FLOORS = {
    "floor, 2 views": {"views": 2},
    "floor, 4 views": {"views": 4},
    "floor, 4 views at once": {"views": 4, "at_once": 4},
    "floor, 4 views, NCHW": {"views": 4, "nchw": True},
}
# How often a view goes through the network, of which a third is the forward pass; MoCo's keys have no other.
PASSES = {"CARE": 4, "CARE, half of the batch": 3, "MoCo": 4 / 3, "published": 4}


class Clock:
    """Seconds of each phase, the device caught up."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, dict.fromkeys(PHASES, 0.0)
        self.last = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, phase: str) -> None:
        now = self.now()
        self.seconds[phase] += now - self.last
        self.last = now


class Ours:
    """The step of trainer.train, without what happens once an epoch."""

    def __init__(self, config: TrainConfig, size: int, device: torch.device, precision: str, compiled: bool):
        self.config, self.device, self.recipe = config, device, augment.Recipe(size)
        torch.manual_seed(0)
        encoder = Encoder.new(config.model, size)
        self.method = trainer.make_method(config, encoder, 4096).to(device).train()
        if compiled:
            encoder.backbone.compile()
        self.optimizer = trainer.make_optimizer(config, self.method)
        self.images = torch.randint(0, 256, (4096, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
        self.autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        self.log = open(os.devnull, "w")  # noqa: SIM115

    def step(self, k: int) -> dict[str, float]:
        clock = Clock(self.device)
        index = torch.randperm(4096, generator=augment.generator(0, k))[: self.config.batch_size]
        images = self.images[index.to(self.device)]
        clock.lap("data")
        views = make_views(images, self.config, self.recipe, k, 0, 1)
        clock.lap("augmentation")
        with self.autocast:
            found = self.method(*views)
        clock.lap("forward")
        found["loss"].backward()
        clock.lap("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_step()
        clock.lap("optimiser")
        row = torch.stack([v.detach() for v in found.values()]).tolist() if self.device.type == "cpu" or k % 20 == 0 else []
        self.log.write(json.dumps(row) + "\n")
        clock.lap("logging")
        return clock.seconds


class Floor:
    """The network alone: forward passes of `views` views of the batch, `at_once` a time, and one backward pass."""

    def __init__(
        self, model: str, size: int, batch: int, device: torch.device, precision: str, views: int, at_once: int = 2, nchw: bool = False
    ):
        self.device, self.nchw = device, nchw
        layout = torch.contiguous_format if nchw else torch.channels_last
        self.encoder = Encoder.new(model, size).to(device, memory_format=layout).train()
        self.views = torch.randn(views // at_once, at_once * batch, 3, size, size, device=device)
        self.autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def step(self, k: int) -> dict[str, float]:
        clock = Clock(self.device)
        with self.autocast:
            features = self.encoder.backbone if self.nchw else self.encoder.features
            loss = sum(F.normalize(self.encoder.projection(features(view)).float(), dim=1).sum() for view in self.views)
        clock.lap("forward")
        loss.backward()
        clock.lap("backward")
        self.encoder.zero_grad()
        return clock.seconds


class Published:
    """Four forward passes of NCHW views in fp32, statistics of each its own; our losses, cheaper than theirs; Adam."""

    def __init__(self, model: str, size: int, batch: int, groups: int, device: torch.device):
        self.encoder = Encoder.new(model, size).to(device, memory_format=torch.contiguous_format).train()
        self.optimizer = torch.optim.Adam(self.encoder.parameters(), lr=1e-3, weight_decay=1e-6)
        self.views, self.groups, self.device = torch.randn(4, batch, 3, size, size, device=device), groups, device

    def step(self, k: int) -> dict[str, float]:
        clock = Clock(self.device)
        z = [F.normalize(self.encoder.projection(self.encoder.backbone(view)), dim=1) for view in self.views]
        loss = losses.info_nce(z[0], z[1], 0.5) + losses.equivariance(z[2], z[3], self.groups)
        clock.lap("forward")
        self.optimizer.zero_grad()
        loss.backward()
        clock.lap("backward")
        self.optimizer.step()
        clock.lap("optimiser")
        return clock.seconds


class Lightly:
    """lightly's SimCLR on views made beforehand."""

    def __init__(self, model: str, size: int, batch: int, device: torch.device):
        from lightly.loss import NTXentLoss

        self.encoder, self.loss, self.device = Encoder.new(model, size).to(device).train(), NTXentLoss(0.5), device
        self.optimizer = torch.optim.SGD(self.encoder.parameters(), lr=0.06, momentum=0.9)
        self.views = torch.randn(2, batch, 3, size, size, device=device)

    def step(self, k: int) -> dict[str, float]:
        clock = Clock(self.device)
        loss = self.loss(*(self.encoder.projection(self.encoder.backbone(view)) for view in self.views))
        clock.lap("forward")
        loss.backward()
        clock.lap("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.lap("optimiser")
        return clock.seconds


def matrix_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of the best of some products of large matrices."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(6):
        clock = Clock(device)
        a @ a
        clock.lap("forward")
        best = min(best, clock.seconds["forward"])
    return 2 * n**3 / best


def flops(model: str, size: int) -> float:
    """Of a forward and a backward pass of one view: three forward passes."""
    encoder = Encoder.new(model, size).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.zeros(1, 3, size, size))
    return 3 * counter.get_total_flops()


@click.command()
@click.option("--model", default="resnet18_cifar", show_default=True)
@click.option("--size", default=32, show_default=True, help="pixels")
@click.option("--batch", default=64, show_default=True)
@click.option("--groups", default=8, show_default=True)
@click.option("--optimizer", default="adam", show_default=True)
@click.option("--precision", type=click.Choice(["auto", "no", "bf16"]), default="auto", show_default=True)
@click.option("--compile", "compiled", is_flag=True)
@click.option("--steps", default=12, show_default=True, help="counted steps of each case, after two that are not")
@click.option("--only", multiple=True, help="names of cases; the default is all")
@click.option("-o", "--output", type=click.Path())
def main(model, size, batch, groups, optimizer, precision, compiled, steps, only, output) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads, precision = use_all_cores(device), trainer.precision(precision)
    common = TrainConfig(model=model, batch_size=batch, equiv_splits=groups, optimizer=optimizer, weight=0.3, image_size=size)
    wanted = lambda name: not only or name in only  # noqa: E731
    cases = {}
    for name, changes in CASES.items():
        if wanted(name):
            changes = {k: int(v * batch) if k == "equivariant_batch_size" else v for k, v in changes.items()}
            changes |= {"equiv_splits": groups // 2} if "equivariant_batch_size" in changes else {}
            cases[name] = Ours(replace(common, **changes), size, device, precision, compiled)
    for name, how in FLOORS.items():
        if wanted(name):
            cases[name] = Floor(model, size, batch, device, precision, **how)
    if wanted("published"):
        cases["published"] = Published(model, size, batch, groups, device)
    if wanted("lightly SimCLR"):
        try:
            cases["lightly SimCLR"] = Lightly(model, size, batch, device)
        except ImportError:
            click.echo("lightly is not installed and left out", err=True)
    rows = {name: [] for name in cases}
    with click.progressbar(range(-2, steps), label="steps", file=None) as bar:
        for k in bar:
            for name, case in cases.items():
                seconds = case.step(k + 2)
                if k >= 0:
                    rows[name].append(seconds)
    peak, work = matrix_peak(device, precision), flops(model, size)
    report = {
        "model": model,
        "size": size,
        "batch": batch,
        "groups": groups,
        "precision": precision,
        "compiled": compiled,
        "threads": threads,
    }
    report |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "matrix_peak_tflops": peak / 1e12, "cases": {}}
    for name, laps in rows.items():
        total = statistics.median(sum(lap.values()) for lap in laps)
        phases = {phase: statistics.median(lap[phase] for lap in laps) for phase in PHASES}
        views = FLOORS[name]["views"] if name in FLOORS else PASSES.get(name, 2)
        other = statistics.median(1 - (lap["forward"] + lap["backward"]) / sum(lap.values()) for lap in laps)
        report["cases"][name] = {
            "images_per_second": batch / total, "seconds": phases, "other": other,
            "of_peak": views * batch * work / total / peak,
        }  # fmt: skip
        if "SimCLR" in rows and name.startswith("CARE"):
            pairs = zip(rows["SimCLR"], laps, strict=True)
            speed = statistics.median(sum(a.values()) / sum(b.values()) for a, b in pairs)
            report["cases"][name]["of_simclr"] = speed
    peak_memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report["peak_memory_gib"] = peak_memory / 2**30
    click.echo(f"{report['device']}, {threads} threads, {precision}, peak {peak / 1e12:.2f} TFLOP/s; {model}, {size} px, batch {batch}")
    click.echo(f"{'':32}{'images/s':>9}{'x SimCLR':>9}{'other':>7}{'of peak':>8}  " + "".join(f"{p:>13}" for p in PHASES) + "  (ms)")
    for name, case in report["cases"].items():
        ratio = f"{case['of_simclr']:.2f}" if "of_simclr" in case else ""
        laps = "".join(f"{1000 * s:>13.1f}" for s in case["seconds"].values())
        click.echo(f"{name:32}{case['images_per_second']:>9.1f}{ratio:>9}{case['other']:>7.1%}{case['of_peak']:>8.1%}  {laps}")
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

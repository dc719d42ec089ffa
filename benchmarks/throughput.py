"""Images per second of whole training steps, where their time goes, and how near they come to the peak.

    python benchmarks/throughput.py              # resnet18_cifar, batch 64: SimCLR, CARE, shared views, MoCo
    python benchmarks/throughput.py --model resnet50_cifar --batch 1024 --steps 20 -o runs/throughput.json

All cases are stepped in turn in one process, so that a noisy machine is noisy for all; medians. Beside ours:
"floor", a bare forward and backward pass of the network on random data, two views at a time (also all four at
once, and in NCHW layout); "published", the work of the public code's step written plainly (four fp32 forward
passes of NCHW views made beforehand, backward, Adam); lightly's SimCLR step, if it is installed. `other` is
the share of a step that is neither forward nor backward pass.
"""

import importlib.util
import io
import json
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import click
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from care_hub import augment, losses
from care_hub.config import TrainConfig
from care_hub.encoder import Encoder
from care_hub.training import trainer
from care_hub.training.batches import make_views

PHASES = ("data", "augmentation", "forward", "backward", "optimizer", "logging")
IMAGES = 4096  # of the data set
FLOORS: dict[str, dict[str, Any]] = {
    "floor, 2 views": {"views": 2},
    "floor, 4 views": {"views": 4},
    "floor, 4 views at once": {"views": 4, "at_once": 4},
    "floor, 4 views, NCHW": {"views": 4, "nchw": True},
}
# How often an image goes through the network, forward and backward, where that is not twice. MoCo's keys go
# forward only, a third of the work.
PASSES = {"CARE": 4, "CARE, half of the batch": 3, "MoCo": 4 / 3, "published": 4}


@dataclass(frozen=True)
class Machine:
    """What all cases run on."""

    device: torch.device
    precision: str
    compiled: bool

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


class Clock:
    """Seconds of each phase, the device's queue of work empty at its end."""

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


class Case(Protocol):
    """One column of work, step after step."""

    def step(self, k: int) -> dict[str, float]:
        """Step number `k`: seconds of each phase."""


class OurStep:
    """The step of `trainer.train`, without what happens once an epoch."""

    def __init__(self, config: TrainConfig, size: int, machine: Machine):
        self.config, self.machine = config, machine
        self.augmentation = augment.AugmentationConfig(size)
        torch.manual_seed(0)
        encoder = Encoder.new(config.model, size)
        self.method = trainer.make_method(config, encoder, IMAGES).to(machine.device).train()
        if machine.compiled:
            encoder.backbone.compile()
        self.optimizer = trainer.make_optimizer(config, self.method)
        random = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (IMAGES, 3, size, size), dtype=torch.uint8, generator=random)
        self.images, self.log = images.to(machine.device), io.StringIO()

    def step(self, k: int) -> dict[str, float]:
        device, clock = self.machine.device, Clock(self.machine.device)
        index = torch.randperm(IMAGES, generator=augment.seeded_generator(0, k))[: self.config.batch_size]
        images = self.images[index.to(device)]
        clock.lap("data")
        views = make_views(images, self.config, self.augmentation, k, 0, 1)
        clock.lap("augmentation")
        with self.machine.autocast():
            found = self.method(*views)
        clock.lap("forward")
        found["loss"].backward()
        clock.lap("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_step()
        clock.lap("optimizer")
        if device.type == "cpu" or k % 20 == 0:
            row = torch.stack([v.detach() for v in found.values()]).tolist()
            self.log.write(json.dumps(row) + "\n")
        clock.lap("logging")
        return clock.seconds


class Floor:
    """The network alone: forward passes of `views` views, `at_once` a time, and one backward pass."""

    def __init__(
        self,
        config: TrainConfig,
        size: int,
        machine: Machine,
        views: int,
        at_once: int = 2,
        nchw: bool = False,
    ):
        self.machine = machine
        layout = torch.contiguous_format if nchw else torch.channels_last
        self.encoder = Encoder.new(config.model, size).to(machine.device, memory_format=layout).train()
        self.features = self.encoder.backbone if nchw else self.encoder.features
        shape = (views // at_once, at_once * config.batch_size, 3, size, size)
        self.views = torch.randn(shape, device=machine.device)

    def step(self, k: int) -> dict[str, float]:
        clock, loss = Clock(self.machine.device), torch.zeros((), device=self.machine.device)
        with self.machine.autocast():
            for view in self.views:
                z = self.encoder.projection(self.features(view)).float()
                loss = loss + F.normalize(z, dim=1).sum()
        clock.lap("forward")
        loss.backward()
        clock.lap("backward")
        self.encoder.zero_grad()
        return clock.seconds


class PublishedStep:
    """Four fp32 forward passes of NCHW views, each with its own batch statistics; backward pass; Adam.

    The losses are ours, which are cheaper.
    """

    def __init__(self, config: TrainConfig, size: int, machine: Machine):
        encoder = Encoder.new(config.model, size)
        self.encoder = encoder.to(machine.device, memory_format=torch.contiguous_format).train()
        self.optimizer = torch.optim.Adam(self.encoder.parameters(), lr=1e-3, weight_decay=1e-6)
        self.views = torch.randn(4, config.batch_size, 3, size, size, device=machine.device)
        self.groups, self.device = config.equiv_splits, machine.device

    def step(self, k: int) -> dict[str, float]:
        clock = Clock(self.device)
        a, b, c, d = (
            F.normalize(self.encoder.projection(self.encoder.backbone(view)), dim=1) for view in self.views
        )
        loss = losses.info_nce(a, b, 0.5) + losses.equivariance(c, d, self.groups)
        clock.lap("forward")
        self.optimizer.zero_grad()
        loss.backward()
        clock.lap("backward")
        self.optimizer.step()
        clock.lap("optimizer")
        return clock.seconds


class LightlyStep:
    """lightly's SimCLR on views made beforehand."""

    def __init__(self, config: TrainConfig, size: int, machine: Machine):
        from lightly.loss import NTXentLoss  # may not be installed

        self.encoder = Encoder.new(config.model, size).to(machine.device).train()
        self.loss, self.device = NTXentLoss(0.5), machine.device
        self.optimizer = torch.optim.SGD(self.encoder.parameters(), lr=0.06, momentum=0.9)
        self.views = torch.randn(2, config.batch_size, 3, size, size, device=machine.device)

    def step(self, k: int) -> dict[str, float]:
        clock = Clock(self.device)
        a, b = (self.encoder.projection(self.encoder.backbone(view)) for view in self.views)
        loss = self.loss(a, b)
        clock.lap("forward")
        loss.backward()
        clock.lap("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.lap("optimizer")
        return clock.seconds


def our_configs(common: TrainConfig) -> dict[str, TrainConfig]:
    half = replace(
        common, equivariant_batch_size=common.batch_size // 2, equiv_splits=common.equiv_splits // 2
    )
    return {
        "SimCLR": replace(common, weight=0.0),
        "CARE": common,
        "CARE, shared views": replace(common, views="shared"),
        "CARE, half of the batch": half,
        "CARE, half of the batch shared": replace(half, views="shared"),
        "MoCo": replace(common, weight=0.0, method="moco"),
    }


def build_cases(common: TrainConfig, size: int, machine: Machine, only: tuple[str, ...]) -> dict[str, Case]:
    """The cases named in `only`, or all."""
    makers: dict[str, Callable[[], Case]] = {
        name: partial(OurStep, config, size, machine) for name, config in our_configs(common).items()
    }
    makers |= {name: partial(Floor, common, size, machine, **how) for name, how in FLOORS.items()}
    makers["published"] = partial(PublishedStep, common, size, machine)
    if importlib.util.find_spec("lightly"):
        makers["lightly SimCLR"] = partial(LightlyStep, common, size, machine)
    elif not only or "lightly SimCLR" in only:
        click.echo("lightly is not installed and left out", err=True)
    return {name: make() for name, make in makers.items() if not only or name in only}


def run_in_turn(cases: dict[str, Case], steps: int, uncounted: int = 2) -> dict[str, list[dict[str, float]]]:
    """Seconds of each phase, step by step."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    with click.progressbar(range(uncounted + steps), label="steps") as bar:
        for k in bar:
            for name, case in cases.items():
                rows[name].append(case.step(k))
    return {name: laps[uncounted:] for name, laps in rows.items()}


def matrix_peak(machine: Machine) -> float:
    """FLOP/s of the best of some products of large matrices."""
    n = 8192 if machine.device.type == "cuda" else 2048
    dtype = torch.bfloat16 if machine.precision == "bf16" else torch.float32
    matrix, best = torch.randn(n, n, device=machine.device, dtype=dtype), float("inf")
    for _ in range(6):
        clock = Clock(machine.device)
        torch.mm(matrix, matrix)
        clock.lap("forward")
        best = min(best, clock.seconds["forward"])
    return 2 * n**3 / best


def network_flops(model: str, size: int) -> float:
    """Of a forward and a backward pass of one view: three forward passes."""
    encoder = Encoder.new(model, size).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.zeros(1, 3, size, size))
    return 3 * counter.get_total_flops()


def summarize(rows: dict[str, list[dict[str, float]]], batch: int, share_of_peak: float) -> dict[str, Any]:
    """Medians of every case. `share_of_peak`: of one view of one image per second."""
    answer: dict[str, Any] = {}
    for name, laps in rows.items():
        total = [sum(lap.values()) for lap in laps]
        other = [1 - (lap["forward"] + lap["backward"]) / sum(lap.values()) for lap in laps]
        passes = FLOORS[name]["views"] if name in FLOORS else PASSES.get(name, 2)
        speed = batch / statistics.median(total)
        answer[name] = {
            "images_per_second": speed,
            "seconds": {phase: statistics.median(lap[phase] for lap in laps) for phase in PHASES},
            "other": statistics.median(other),
            "of_peak": passes * speed * share_of_peak,
        }
        if "SimCLR" in rows and name.startswith("CARE"):
            simclr = [sum(lap.values()) for lap in rows["SimCLR"]]
            answer[name]["of_simclr"] = statistics.median(a / b for a, b in zip(simclr, total, strict=True))
    return answer


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def show(report: dict[str, Any]) -> None:
    about = "{device}, {threads} threads, {precision}, peak {matrix_peak_tflops:.2f} TFLOP/s; "
    click.echo((about + "{model}, {size} px, batch {batch}").format_map(report))
    phases = "".join(f"{phase:>13}" for phase in PHASES)
    click.echo(f"{'':32}{'images/s':>9}{'x SimCLR':>9}{'other':>7}{'of peak':>8}  {phases}  (ms)")
    for name, case in report["cases"].items():
        ratio = f"{case['of_simclr']:.2f}" if "of_simclr" in case else ""
        numbers = f"{case['images_per_second']:>9.1f}{ratio:>9}{case['other']:>7.1%}{case['of_peak']:>8.1%}"
        laps = "".join(f"{1000 * seconds:>13.1f}" for seconds in case["seconds"].values())
        click.echo(f"{name:32}{numbers}  {laps}")


@click.command()
@click.option("--model", default="resnet18_cifar", show_default=True)
@click.option("--size", default=32, show_default=True, help="pixels")
@click.option("--batch", default=64, show_default=True)
@click.option("--groups", default=8, show_default=True)
@click.option("--optimizer", default="adam", show_default=True)
@click.option("--precision", type=click.Choice(["auto", "no", "bf16"]), default="auto", show_default=True)
@click.option("--compile", "compiled", is_flag=True)
@click.option("--steps", default=12, show_default=True, help="counted steps of each case, after two others")
@click.option("--only", multiple=True, help="names of cases; the default is all")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    model: str,
    size: int,
    batch: int,
    groups: int,
    optimizer: str,
    precision: str,
    compiled: bool,
    steps: int,
    only: tuple[str, ...],
    output: Path | None,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = Machine(device, trainer.precision(precision, device), compiled)
    common = TrainConfig(
        model=model, batch_size=batch, equiv_splits=groups, optimizer=optimizer, weight=0.3, image_size=size
    )
    rows = run_in_turn(build_cases(common, size, machine, only), steps)
    peak = matrix_peak(machine)
    report = {
        "model": model,
        "size": size,
        "batch": batch,
        "groups": groups,
        "precision": machine.precision,
        "compiled": compiled,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "matrix_peak_tflops": peak / 1e12,
        "cases": summarize(rows, batch, network_flops(model, size) / peak),
        "peak_memory_gib": peak_memory_gib(device),
    }
    show(report)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What a run says while it trains, and how it is asked to stop."""

import dataclasses
import json
import logging
import math
import os
import signal
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ..config import TrainConfig
from ..errors import CareHubError
from ..files import file_errors
from ..schedule import Plan

logger = logging.getLogger(__name__)


class Interrupt:
    """Ctrl-C or a termination signal ends the loop after the current step, a second one at once."""

    def __init__(self, enabled: bool):
        self.asked = False
        self.signals = (signal.SIGINT, signal.SIGTERM) if enabled else ()
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        self.before = {number: signal.signal(number, self._ask) for number in self.signals}
        return self

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(number, self.before[number])

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def start_trackers(run: Path, config: TrainConfig, accelerator: Accelerator) -> None:
    """Start what `log_with` names: its project and entity are ours where given, else those of WANDB_*."""
    if config.log_with == "none":
        return
    accelerator.project_configuration.logging_dir = str(run)
    project = os.environ.get("WANDB_PROJECT") if config.log_with == "wandb" else None
    options = {k: str(v) for k, v in dataclasses.asdict(config).items()}
    entity = {"wandb": {"entity": config.user}} if config.user else {}
    accelerator.init_trackers(config.project or project or "care_hub", options, entity)


class Progress:
    """Progress bar, metrics.jsonl and trackers. Losses stay on the device and are fetched in blocks
    of steps.

    `start`, `seconds`: the step from which this run goes on, and how long it has trained before.
    """

    def __init__(
        self, run: Path, plan: Plan, start: int, seconds: float, config: TrainConfig, accelerator: Accelerator
    ):
        self.plan, self.start, self.config, self.accelerator = plan, start, config, accelerator
        self.main = accelerator.is_main_process
        self.block = 1 if accelerator.device.type == "cpu" else 20
        self.seconds, self.durations = seconds, list[float]()
        self.pending: list[tuple[int, float, float, float, Tensor]] = []
        self.micro: list[Tensor] = []
        self.file: TextIO | None = None
        if self.main:
            path = run / "metrics.jsonl"
            with file_errors(path):
                _remove_lines_after(path, start)
                self.file = path.open("a", buffering=1)
        self.bar = tqdm(
            total=plan.stop, initial=start, unit="step", disable=not self.main, dynamic_ncols=True
        )

    def add_losses(self, losses: dict[str, Tensor]) -> None:
        """The losses of one micro-batch."""
        self.micro.append(torch.stack([losses[k].detach() for k in ("loss", "infonce", "equivariance")]))

    def add_step(self, step: int, lr: float, weight: float, seconds: float) -> None:
        """One optimizer step is done, on the micro-batches since the last."""
        self.seconds += seconds
        self.durations = [*self.durations[-3:], seconds]
        self.pending.append((step, lr, weight, seconds, torch.stack(self.micro).mean(dim=0)))
        self.micro = []
        if step == self.start + 3 and self.main:
            left = sum(self.durations[1:]) / 3 * (self.plan.stop - step - 1)  # the first step is slower
            logger.info("about %.1f minutes of training to go on this machine", left / 60)
        if len(self.pending) >= self.block:
            self.flush()

    def flush(self) -> None:
        """Fetch the losses of pending steps, which waits for the device. Raises CareHubError if one
        is not finite.
        """
        if not self.pending:
            return
        values = torch.stack([losses for *_, losses in self.pending]).tolist()
        images = self.config.batch_size * self.config.gradient_accumulation
        for pending, (loss, infonce, equivariance) in zip(self.pending, values, strict=True):
            step, lr, weight, seconds, _ = pending
            if not math.isfinite(loss):
                advice = "lower `lr` or try `mixed_precision='no'` (earlier checkpoints are kept)"
                raise CareHubError(f"the loss became {loss} at step {step + 1}; {advice}.")
            row = {"step": step + 1, "epoch": step // self.plan.steps_per_epoch + 1, "loss": loss}
            row |= {"infonce": infonce, "equivariance": equivariance, "weight": weight, "lr": lr}
            self._write(row | {"images_per_second": images / seconds})
        parts = f"loss {loss:.3f} infonce {infonce:.3f} equi {equivariance:.3f}"
        self.bar.set_postfix_str(f"{parts} {images / seconds:.0f} images/s", refresh=False)
        self.bar.update(len(self.pending))
        self.pending = []

    def add_knn(self, step: int, top1: float | None) -> None:
        """The result of a kNN check after `step` steps; None where nothing could be measured."""
        if top1 is None:
            return
        self.flush()
        epoch = step // self.plan.steps_per_epoch
        self._write({"step": step, "epoch": epoch, "knn_top1": top1})
        if self.main:
            logger.info("epoch %d: kNN top-1 %.1f %%", epoch, top1)

    def _write(self, row: dict[str, Any]) -> None:
        if self.file:
            self.file.write(json.dumps(row) + "\n")
        due = "knn_top1" in row or row["step"] % self.config.log_freq == 0
        if due and self.config.log_with != "none":
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        """Write what is pending."""
        self.flush()
        self.bar.close()
        if self.file:
            self.file.close()


def _remove_lines_after(path: Path, start: int) -> None:
    """Forget lines beyond the checkpoint, and a line that a crash cut short."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        path.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= start))

"""What a run says while it trains."""

import json
import logging
import math
import operator
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..config import TrainConfig
from ..distributed import from_main
from ..encoder import Encoder
from ..errors import CareHubError
from ..files import file_errors, write_text
from ..hub.export import READ_ERRORS
from ..schedule import Plan
from .checkpoint import resumable

logger = logging.getLogger(__name__)
POSTFIX = "loss {loss:.3f} infonce {infonce:.3f} equi {equivariance:.3f} {images_per_second:.0f} images/s"


def nothing(*_: Any) -> None:
    """What is called where nothing is to be done."""


@dataclass(frozen=True)
class Callbacks:
    """Functions that `care_hub.train` calls on the main process; each may be left out.

    `step`: with each line of metrics.jsonl as it is written, a dict; on a GPU losses come twenty
    steps at a time. `epoch`: with the number of each epoch that is done and saved, from 1, and the
    encoder, which may be asked to `encode`. `end`: with what is in results.json and the run folder,
    when the export is complete. What they raise ends the run, which can be resumed.
    """

    step: Callable[[dict[str, Any]], Any] = nothing
    epoch: Callable[[int, Encoder], Any] = nothing
    end: Callable[[dict[str, float], Path], Any] = nothing


NO_CALLBACKS = Callbacks()


def start_trackers(run: Path, config: TrainConfig, accelerator: Accelerator) -> None:
    """Start what `log_with` names, with its files in `run`.

    Project, entity, name and folder of wandb are ours where options give them, else those of
    WANDB_*. Raises CareHubError, on all processes, where it can't be started.
    """
    if config.log_with == "none":
        return
    accelerator.project_configuration.logging_dir = str(run)
    options, project = {}, None
    if config.log_with == "wandb":
        project = os.environ.get("WANDB_PROJECT")
        ours = {"name": run.name, "dir": str(run)}
        options = {name: ours[name] for name in ours if f"WANDB_{name.upper()}" not in os.environ}
        options |= {"entity": config.user} if config.user else {}

    def begin() -> None:
        try:
            accelerator.init_trackers(
                config.project or project or "care_hub", hyperparameters(config), {config.log_with: options}
            )
        except Exception as error:  # whatever a client raises: no network, no account, no space
            raise CareHubError(f"`log_with='{config.log_with}'` can't be started ({error}).") from error

    from_main(begin)


def hyperparameters(config: TrainConfig) -> dict[str, int | float | str]:
    """All options that have a value, numbers as numbers, as trackers take them.

    >>> [hyperparameters(TrainConfig())[name] for name in ("lr", "weight_start_epochs", "jitter")]
    [0.2, 16.0, '0.3 0.3 0.3 0.5']
    """
    values = (asdict(config) | config.published()).items()
    return {k: " ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in values if v is not None}


class Progress:
    """Progress bar, metrics.jsonl and trackers. Losses stay on the device and are fetched in blocks
    of steps.

    `start`, `seconds`: the step from which this run goes on, and how long it has trained before.
    """

    def __init__(
        self,
        run: Path,
        plan: Plan,
        start: int,
        seconds: float,
        config: TrainConfig,
        accelerator: Accelerator,
        callbacks: Callbacks = NO_CALLBACKS,
    ):
        self.plan, self.start, self.config, self.accelerator = plan, start, config, accelerator
        self.callbacks = callbacks
        self.main = accelerator.is_main_process
        self.block = 1 if accelerator.device.type == "cpu" else 20
        self.images = config.batch_size * config.gradient_accumulation  # of a step
        self.seconds, self.durations = seconds, list[float]()
        self.pending: list[tuple[int, Tensor, dict[str, float]]] = []
        self.micro: list[Tensor] = []
        self.losses: tuple[str, ...] = ()  # their names
        self.file: TextIO | None = None
        self.path = run / "metrics.jsonl"
        if self.main:
            with resumable(run), file_errors(self.path):
                _remove_lines_after(self.path, start, again=start == plan.stop)
                self.file = self.path.open("a", buffering=1)
        self.bar = tqdm(
            total=plan.stop, initial=start, unit="step", disable=not self.main, dynamic_ncols=True
        )

    def add_losses(self, losses: dict[str, Tensor]) -> None:
        """The losses of one micro-batch."""
        self.losses = tuple(losses)
        self.micro.append(torch.stack([loss.detach() for loss in losses.values()]))

    def add_step(self, step: int, lr: float, weight: float, seconds: float) -> None:
        """One optimizer step is done, on the micro-batches since the last."""
        self.seconds += seconds
        self.durations = [*self.durations[-3:], seconds]
        others = {"weight": weight, "lr": lr, "images_per_second": self.images / seconds}
        self.pending.append((step, torch.stack(self.micro).mean(dim=0), others))
        self.micro = []
        if step == self.start + 3 and self.main:
            left, last = (self.plan.price(self.config, k) for k in (step + 1, step - 2))
            left *= sum(self.durations[1:]) / (last - left)  # of three steps: the first is slower
            logger.info("about %.1f minutes of training to go on this machine", left / 60)
        if len(self.pending) >= self.block:
            self.flush()

    def flush(self) -> None:
        """Fetch the losses of pending steps, which waits for the device. Raises CareHubError if one
        is not finite.
        """
        if not self.pending:
            return
        values = torch.stack([losses for _, losses, _ in self.pending]).tolist()
        for (step, _, others), losses in zip(self.pending, values, strict=True):
            row: dict[str, Any] = {"step": step + 1, "epoch": step // self.plan.steps_per_epoch + 1}
            row |= zip(self.losses, losses, strict=True)
            if not math.isfinite(row["loss"]):
                advice = "lower `lr` or try `mixed_precision='no'` (earlier checkpoints are kept)"
                raise CareHubError(f"the loss became {row['loss']} at step {step + 1}; {advice}.")
            row |= others
            self._write(row)
        with suppress(OSError):  # the terminal is gone, or the `tee` behind it
            self.bar.set_postfix_str(POSTFIX.format(**row), refresh=False)
            self.bar.update(len(self.pending))
        self.pending = []

    def add_knn(self, step: int, top1: float | None) -> None:
        """The result of a kNN check after `step` steps; None where nothing could be measured."""
        if top1 is None:
            return
        self.flush()
        epoch = -(-step // self.plan.steps_per_epoch)
        self._write({"step": step, "epoch": epoch, "knn_top1": top1})
        if self.main:
            logger.info("epoch %d: kNN top-1 %.1f %%", epoch, top1)

    def end_epoch(self, step: int, encoder: Encoder) -> None:
        """Call `callbacks.epoch` if an epoch ends with step number `step`, which this process has done."""
        epoch, rest = divmod(step, self.plan.steps_per_epoch)
        if self.main and rest == 0 and step > self.start and self.callbacks.epoch is not nothing:
            self.flush()
            self.callbacks.epoch(epoch, encoder)

    def add_results(self, step: int, results: dict[str, float]) -> None:
        """What was measured in the end, and the figures in the run folder, go to the trackers."""
        self.accelerator.log({f"final/{name}": value for name, value in results.items()}, step=step)
        run = self.path.parent
        for path in (run / "export" / "neighbors.png", run / "equivariance.png"):
            for tracker in self.accelerator.trackers if path.is_file() else ():
                image = np.asarray(Image.open(path).convert("RGB"))
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({path.stem: image[None]}, step=step, **layout)

    def _write(self, row: dict[str, Any]) -> None:
        if self.file:
            with resumable(self.path.parent), file_errors(self.path):
                self.file.write(json.dumps(row) + "\n")
            self.callbacks.step(row)
        if "knn_top1" in row or row["step"] % self.config.log_freq == 0:
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        """Write what is pending, and end the bar's line, so that whatever is said next begins one."""
        self.flush()
        with suppress(OSError):
            self.bar.close()

    def release(self) -> None:
        """End the bar's line, and close the file."""
        with suppress(OSError):
            self.bar.close()
        if self.file:
            with suppress(OSError):  # of a line that could not be written, which was said
                self.file.close()


def _remove_lines_after(path: Path, start: int, again: bool) -> None:
    """Forget lines beyond the checkpoint, one that a crash cut short, and, with a warning, damaged ones.

    And the kNN of the last step, if all steps are done and it is measured `again`.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    steps = [_step(line) for line in lines]
    if damaged := [number for number, step in enumerate(steps[:-1], 1) if step is None]:
        numbers = ", ".join(map(str, damaged[:9])) + ", ..." * (len(damaged) > 9)
        logger.warning("'%s': damaged lines are left out (%s).", path, numbers)
    sound = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= start]
    if again and sound and "knn_top1" in json.loads(sound[-1]):
        sound.pop()
    if sound != lines:
        write_text(path, b"".join(line + b"\n" for line in sound).decode())


def _step(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl, None for what is none."""
    try:
        return operator.index(json.loads(line.decode())["step"])
    except READ_ERRORS:
        return None

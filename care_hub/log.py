"""What a run tells while it trains, and how it is asked to stop."""

import json
import signal
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from .config import Plan, TrainConfig
from .errors import CareHubError


class Interrupt:
    """Ctrl-C or a termination signal ends the loop after the current step; a second one ends it at once."""

    def __init__(self, enabled: bool):
        self.asked, self.enabled = False, enabled

    def __enter__(self):
        if self.enabled:
            self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame):
        self.asked = True
        signal.signal(number, self.before[number])

    def __exit__(self, *_):
        if self.enabled:
            for number, handler in self.before.items():
                signal.signal(number, handler)


class Log:
    """Progress bar, metrics.jsonl and trackers. Losses stay on the device and are fetched in blocks."""

    def __init__(self, run: Path, plan: Plan, start: int, config: TrainConfig, accelerator: Accelerator):
        self.plan, self.config, self.accelerator, self.main = plan, config, accelerator, accelerator.is_main_process
        self.block = 1 if accelerator.device.type == "cpu" else 20
        self.seconds, self.steps, self.pending, self.micro = 0.0, 0, [], []
        if self.main:
            path = run / "metrics.jsonl"
            self._drop_after(path, start)
            self.file = path.open("a", buffering=1)
        self.bar = tqdm(total=plan.stop, initial=start, unit="step", disable=not self.main, dynamic_ncols=True)

    @staticmethod
    def _drop_after(path: Path, start: int) -> None:
        """Forget lines beyond the checkpoint, and a line that a crash cut short."""
        if path.is_file():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            path.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= start))

    def losses(self, losses: dict[str, Tensor]) -> None:
        self.micro.append(torch.stack([losses[k].detach() for k in ("loss", "infonce", "equivariance")]))

    def step(self, step: int, lr: float, weight: float, seconds: float) -> None:
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1
        self.pending.append((step, lr, weight, seconds, torch.stack(self.micro).mean(dim=0)))
        self.micro = []
        if self.steps == 1:
            self.first = seconds  # slower than the rest
        if self.steps == 4 and self.main:
            left = (self.seconds - self.first) / 3 * (self.plan.stop - step - 1)
            self.bar.write(f"about {left / 60:.1f} minutes of training to go on this machine")
        if len(self.pending) >= self.block:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        values = torch.stack([p[-1] for p in self.pending]).tolist()
        for (step, lr, weight, seconds, _), (loss, infonce, equivariance) in zip(self.pending, values, strict=True):
            speed = self.config.batch_size * self.config.gradient_accumulation / seconds
            if loss != loss or abs(loss) == float("inf"):
                raise CareHubError(
                    f"the loss became {loss} at step {step + 1}; lower --lr or try --mixed-precision no (earlier checkpoints are kept)."
                )
            row = {"step": step + 1, "epoch": step // self.plan.steps_per_epoch + 1, "loss": loss, "infonce": infonce}
            self.write(row | {"equivariance": equivariance, "weight": weight, "lr": lr, "images_per_second": speed})
        self.bar.set_postfix_str(f"loss {loss:.3f} infonce {infonce:.3f} equi {equivariance:.3f} {speed:.0f} images/s", refresh=False)
        self.bar.update(len(self.pending))
        self.pending = []

    def knn(self, step: int, top1: float | None) -> None:
        if top1 is not None:
            self.flush()
            self.write({"step": step, "epoch": step // self.plan.steps_per_epoch, "knn_top1": top1})
            self.bar.write(f"epoch {step // self.plan.steps_per_epoch}: kNN top-1 {top1:.1f} %") if self.main else None

    def write(self, row: dict) -> None:
        if self.main:
            self.file.write(json.dumps(row) + "\n")
        if self.config.log_with != "none":
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        self.flush()
        self.bar.close()
        if self.main:
            self.file.close()

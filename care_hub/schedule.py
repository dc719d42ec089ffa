"""Learning rate and weight of the equivariance loss at every optimizer step: pure functions of the
step.
"""

import math
from dataclasses import dataclass

from .config import TrainConfig
from .errors import CareHubError


@dataclass(frozen=True)
class Plan:
    """What follows from the options and the size of the data; everything in optimizer steps."""

    steps_per_epoch: int
    steps: int  # the whole schedule
    stop: int  # where this run ends
    warmup: int  # of the learning rate
    weight_start: int  # the first step with the equivariance loss
    weight_warmup: int  # from there

    @classmethod
    def of(cls, config: TrainConfig, images: int) -> "Plan":
        """The plan for `images` training images. Raises CareHubError if they do not fill one step."""
        per_step = config.batch_size * config.gradient_accumulation
        if images < per_step:
            few = f"{images} training images are fewer than the {per_step} of one optimizer step"
            raise CareHubError(f"{few}; lower `batch_size`.")
        per_epoch = images // per_step
        steps = config.epochs * per_epoch
        stop = min(steps, config.max_steps or steps)
        warmup = round(config.warmup_epochs * per_epoch)
        start, growth = (round(epochs * per_epoch) for epochs in config.weight_epochs)
        return cls(
            per_epoch, steps, stop, warmup, min(start, steps - 1), 0 if config.steers_alone else growth
        )

    def price(self, config: TrainConfig, since: int = 0) -> float:
        """What the run costs from step `since` on, in steps of the plain method.

        A view passed through the encoder costs 1, and 2 more with gradients. The plain step is 6 of SimCLR
        and 4 of MoCo, whose keys have none. The equivariance loss adds a pair with gradients of every
        `stride`-th image, unless SimCLR shares its own.
        """
        free = not config.weight or (config.views == "shared" and config.method == "simclr")
        added = 0 if free else 6 / config.equivariance_stride
        late = max(0, self.stop - max(since, self.weight_start))
        return self.stop - since + late * added / (4 if config.method == "moco" else 6)


def lr_at(step: int, total: int, warmup: int, peak: float, schedule: str) -> float:
    """Learning rate at optimizer step `step` (from 0): linear warm-up, then constant or half a cosine.

    >>> [round(lr_at(step, 5, 2, 1.0, "cosine"), 2) for step in range(5)]
    [0.5, 1.0, 1.0, 0.75, 0.25]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def weight_at(step: int, start: int, warmup: int, weight: float) -> float:
    """Weight of the equivariance loss at step `step` (from 0): 0 before `start`, then it grows
    linearly over `warmup` steps.
    """
    if step < start:
        return 0.0
    return weight * min(1.0, (step + 1 - start) / warmup) if warmup else weight

"""Whether training has diverged."""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ..config import TrainConfig
from ..errors import CareHubError

# Root mean square of all weights. They begin near 0.1 and stay below 1; where normalization hides their size,
# a learning rate of 1e4 makes them 7 within 30 steps, and no loss tells.
LARGEST = 3.0


def largest_size(method: nn.Module) -> float:
    """The root mean square that weights may reach which begin as those of `method`, maybe foreign ones."""
    weights = _trained(method)
    return LARGEST * max(1.0, get_total_norm(weights).item() / math.sqrt(sum(w.numel() for w in weights)))


def check_weights(
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    config: TrainConfig,
    largest: float = LARGEST,
) -> None:
    """Raise CareHubError if the weights that are trained have a root mean square above `largest`, or they,
    statistics or `optimizer` are not finite.

    The same on every process. Computed where the weights are; waits for them once.
    """
    weights = _trained(method)
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    # Statistics and MoCo's queue: some networks have infinite constants among their buffers.
    changing = [v for k, v in method.named_buffers() if k.endswith(("running_mean", "running_var", "queue"))]
    others = [value for value in (*changing, *states) if value.is_floating_point()]
    norms = torch.stack(
        [get_total_norm(tensors).to(weights[0].device) for tensors in (weights, [*weights, *others])]
    )
    of_weights, of_all = norms.tolist()
    size = of_weights / math.sqrt(sum(w.numel() for w in weights))
    if math.isfinite(of_all) and size <= largest:
        return
    what = f"have a root mean square of {size:.3g}" if math.isfinite(of_all) else "are no longer finite"
    advice = f"lower `lr`, which is {config.lr:g}, in a new run (earlier checkpoints are kept)"
    raise CareHubError(f"training diverged: at step {step} its weights {what}; {advice}.")


def _trained(method: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in method.parameters() if weight.requires_grad]

"""What makes many processes one: a gather and a BatchNorm through which gradients flow.

Convention: every process computes the same loss L of the global batch, and DistributedDataParallel
averages the gradients of the W processes. So the gradient that leaves `gather` backwards is the sum over
the processes, W times dL / dx.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import CareHubError
from .launched import launched_options, on_cpu

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, number of processes).

    >>> world()
    (0, 1)
    """
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world()[1])]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Each process asks the others for the gradient of its own rows: one message where a ring takes many.
        parts = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(parts, grad.contiguous())
        return parts.unflatten(0, (world()[1], -1)).sum(0)


def gather(x: Tensor) -> Tensor:
    """(b, ...) of every process -> (W b, ...) in rank order, the same everywhere; differentiable."""
    return x if world()[1] == 1 else _Gather.apply(x)


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm over the batch of all processes, for the CPU, where torch's SyncBatchNorm does not run.

    (b, C) or (b, C, ...) with the same b in every process. Affine, with running statistics.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world()[1] == 1:
            return super().forward(x)
        y = x if x.dtype == torch.float64 else x.float()
        local = torch.stack(torch.var_mean(y, [0, *range(2, x.ndim)], correction=0))
        variances, means = gather(local[None]).unbind(1)  # (W, C) each
        mean = means.mean(0)
        # Source: Chan et al. 1979 (no difference of large sums).
        var = (variances + (means - mean).square()).mean(0)
        with torch.no_grad():
            count = y.numel() // y.shape[1] * world()[1]
            unbiased = var * (count / (count - 1))
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = (self.weight / (var + self.eps).sqrt()).view(shape)
        return ((y - mean.view(shape)) * scale + self.bias.view(shape)).to(x.dtype)


class GlobalBatchNormAct(GlobalBatchNorm):
    """timm's BatchNormAct2d (BatchNorm, dropout, activation) over the batch of all processes."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


TWINS: dict[type[nn.Module], type[GlobalBatchNorm]] = {
    nn.BatchNorm1d: GlobalBatchNorm,
    nn.BatchNorm2d: GlobalBatchNorm,
    BatchNormAct2d: GlobalBatchNormAct,
}


def global_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every BatchNorm seeing the global batch; with one process it stays as it is.

    Parameters and buffers stay the same tensors under the same names. Modules inside are replaced
    in place; a `module` that is a BatchNorm itself is returned replaced.
    """
    if world()[1] == 1:
        return module
    if device.type != "cpu":
        return convert_sync_batchnorm(module)
    if type(module) in TWINS:
        return _global_twin(module)
    for name, child in module.named_children():
        setattr(module, name, global_batch_norm(child, device))
    return module


def _global_twin(norm: Any) -> GlobalBatchNorm:
    """A GlobalBatchNorm with the parameters, buffers and children of `norm`, the same objects."""
    twin = TWINS[type(norm)](norm.num_features, norm.eps, norm.momentum)
    tensors = (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False))
    for name, value in (*tensors, *norm.named_children()):
        setattr(twin, name, value)
    twin.training = norm.training
    return twin


def from_main(work: Callable[[], T]) -> T:
    """What `work` gives on the main process, for all of them, which all call this.

    Raises the CareHubError of `work` on all, so that none waits for one that has stopped.
    """
    result, problem = None, ""
    if world()[0] == 0:
        try:
            result = work()
        except CareHubError as error:
            problem = str(error)
    result, problem = broadcast_object_list([result, problem])
    if problem:
        raise CareHubError(problem)
    return result


class Votes:
    """Questions on which all processes agree at every step, without a wait of the device.

    Answers travel from CPU to CPU, through a group of their own where that of the gradients is the
    device's.
    """

    def __init__(self) -> None:
        many = world()[1] > 1
        separate = many and dist.get_backend() != "gloo"
        self.group: Any = dist.new_group(backend="gloo") if separate else None
        self.answers = torch.empty(0)
        self.work: dist.Work | None = None

    def cast(self, *answers: bool) -> None:
        """Every process sends its answers, and goes on."""
        self.answers = torch.tensor(answers, dtype=torch.uint8)
        if world()[1] > 1:
            self.work = dist.all_reduce(self.answers, dist.ReduceOp.MAX, self.group, async_op=True)

    def count(self) -> list[bool]:
        """For each question, whether any process has said yes, the same on all."""
        if self.work:
            self.work.wait()
        return self.answers.bool().tolist()


@contextmanager
def peer_errors() -> Iterator[None]:
    """For `with`: raises CareHubError where another process of the group has ended, or hangs."""
    try:
        yield
    except RuntimeError as error:
        if world()[1] > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            reason = "another process of this run has ended, or does not answer"
            where = "its own message says why, or the system's log, as of an out-of-memory killer"
            raise CareHubError(f"{reason}; {where}.") from error
        raise


def inference_accelerator() -> Accelerator:
    """An accelerate.Accelerator for evaluation, on the CPU if there is no accelerator.

    Raises CareHubError for settings of Accelerate that are not supported: see `launched_options`.
    """
    accumulation = launched_options().get("gradient_accumulation", 1)
    return Accelerator(
        cpu=on_cpu(), gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation)
    )

"""What makes many processes one: a gather and a BatchNorm through which gradients flow.

Convention: every process computes the same loss L of the global batch, and DistributedDataParallel averages the
gradients of W processes; so what leaves `gather` backwards is the sum over the processes, W times dL / dx.
"""

import os

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world()[1])]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        parts = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(parts, grad.contiguous())  # one's own rows from everyone: one message where a ring takes many
        return parts.unflatten(0, (world()[1], -1)).sum(0)


def gather(x: Tensor) -> Tensor:
    """(b, ...) of every process -> (W b, ...) in rank order, the same everywhere."""
    return x if world()[1] == 1 else _Gather.apply(x)


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batch of all processes, for the CPU, where torch's SyncBatchNorm does not run."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world()[1] == 1:
            return super().forward(x)
        axes = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        y = x if x.dtype == torch.float64 else x.float()
        count = y.numel() // y.shape[1] * world()[1]
        local_var, local_mean = torch.var_mean(y, axes, correction=0)
        means, variances = gather(torch.stack([local_mean, local_var])[None]).unbind(1)  # (W, C) each, equal counts
        mean = means.mean(0)
        var = (variances + (means - mean).square()).mean(0)  # Chan et al. 1979: exact, and no difference of large sums
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), self.momentum)
        scale = (self.weight / (var + self.eps).sqrt()).view(shape)
        return ((y - mean.view(shape)) * scale + self.bias.view(shape)).to(x.dtype)


class GlobalBatchNormAct(GlobalBatchNorm, BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(GlobalBatchNorm.forward(self, x) if self.training else nn.BatchNorm2d.forward(self, x)))


def global_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Make every BatchNorm of `module` see the global batch; with one process nothing changes."""
    if world()[1] == 1:
        return module
    if device.type != "cpu":
        return convert_sync_batchnorm(module)
    twins = {nn.BatchNorm1d: GlobalBatchNorm, nn.BatchNorm2d: GlobalBatchNorm, BatchNormAct2d: GlobalBatchNormAct}
    for child in module.modules():
        child.__class__ = twins.get(type(child), type(child))  # the same parameters and buffers, another forward
    return module


def start():
    """An accelerate.Accelerator for work without training, on all cores."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    use_all_cores(accelerator.device)
    return accelerator


def use_all_cores(device: torch.device) -> int:
    """Share the cores among this machine's processes; `accelerate launch` and torchrun ask for one thread each."""
    if device.type == "cpu" and int(os.environ.get("OMP_NUM_THREADS", "1") or 1) <= 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return torch.get_num_threads()

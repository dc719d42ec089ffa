"""What a user can rely on where there is a GPU; skipped elsewhere."""

import os

import pytest
import torch
import torch.distributed as dist
from processes import free_port
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from care_hub.config import TrainConfig
from care_hub.data.images import InMemoryImages
from care_hub.distributed import global_batch_norm
from care_hub.encoder import Encoder
from care_hub.evaluate.attributes import probe_attributes
from care_hub.training import trainer
from care_hub.training.batches import make_views, training_augmentation

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CONFIGS = {
    "one head": {"weight": 1.0, "weight_start_epochs": 0},
    "steering head": {"weight": 1.0, "weight_start_epochs": 0, "steering_head": True},
    "plain": {"weight": 0.0},
    "MoCo": {"weight": 1.0, "weight_start_epochs": 0, "method": "moco", "queue_size": 128},
}


def method_and_config(options: dict) -> tuple[nn.Module, TrainConfig]:
    torch.manual_seed(0)
    config = TrainConfig(batch_size=64, mixed_precision="no", **options)
    encoder = Encoder.new(config.model, 32)
    encoder.set_contrastive_head(config.steering_head)
    return trainer.make_method(config, encoder, 512).to(DEVICE).train(), config


def gradients(method: nn.Module, config: TrainConfig, rank: int = 0, processes: int = 1) -> dict[str, Tensor]:
    """Those of one step, in float64, after which rounding does not show through BatchNorm."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=random)
    part = images.chunk(processes)[rank].to(DEVICE)
    views = make_views(part, config, training_augmentation(config), 0, rank, processes)
    method(*(view.double() for view in views))["loss"].backward()
    return {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_step_waits_for_nothing(kind):
    method, config = method_and_config(CONFIGS[kind])
    optimizer = trainer.make_optimizer(config, method)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8).cuda()

    def step(k: int) -> None:
        views = make_views(images, config, training_augmentation(config), k, 0, 1)
        with torch.autocast("cuda", torch.bfloat16):
            found = method(*views)
        found["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step()

    step(0)  # what is made once, like cuDNN's plans
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k in range(1, 4):
            step(k)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_attributes_are_probed_where_a_run_has_left_the_images():
    encoder = Encoder.new("resnet10_w16_small", 32).eval()
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=random)
    images = InMemoryImages(32, torch.zeros(40, dtype=torch.long), ["one"], pixels)
    there = probe_attributes(encoder, images, images)
    assert probe_attributes(encoder, images.to(DEVICE), images)["backbone"] == there["backbone"]


def member(rank: int, port: str, options: dict, path: str) -> None:
    """One of two processes that share the card, and so can't talk by NCCL."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    method, config = method_and_config(options)
    method = global_batch_norm(method.double(), torch.device(DEVICE))
    wrapped = DistributedDataParallel(method, broadcast_buffers=False)
    found = gradients(wrapped, config, rank, 2)
    if rank == 0:
        save_file({name: grad.contiguous() for name, grad in found.items()}, path)
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["one head", "steering head"])
def test_two_processes_on_one_card_have_the_gradients_of_one(tmp_path, kind):
    path = tmp_path / "gradients.safetensors"
    arguments = (free_port(), CONFIGS[kind], str(path))
    torch.multiprocessing.start_processes(member, arguments, 2, start_method="spawn")
    method, config = method_and_config(CONFIGS[kind])
    of_two = load_file(path, DEVICE)
    for name, grad in gradients(method.double(), config).items():
        torch.testing.assert_close(of_two[f"module.{name}"], grad, rtol=1e-6, atol=1e-9)

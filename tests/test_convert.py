"""Checkpoints of the public code become exports with the same features; others are refused."""

import argparse
import json
import os

import numpy as np
import pytest
import torch
import torchvision
from helpers import care_hub_command
from torch import nn

import care_hub
from care_hub.convert import convert_checkpoint
from care_hub.errors import CareHubError


class PublicCifar(nn.Module):
    """The layout of the public CIFAR model: f, a Sequential without max-pool and fc, and g."""

    def __init__(self, depth):
        super().__init__()
        net = getattr(torchvision.models, depth)()
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.f = nn.Sequential(*(m for name, m in net.named_children() if name not in ("maxpool", "fc")))
        first = nn.Linear(net.fc.in_features, 512, bias=False)
        self.g = nn.Sequential(first, nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128))

    def forward(self, x):
        h = torch.flatten(self.f(x), 1)
        return h, nn.functional.normalize(self.g(h), dim=1)


class PublicImageNet(nn.Module):
    def __init__(self, moco):
        super().__init__()
        self.encoder_q = torchvision.models.resnet50()
        self.encoder_q.fc = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 128))
        if moco:
            self.encoder_k = torchvision.models.resnet50()
            self.encoder_k.fc = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 128))
            self.register_buffer("queue", torch.zeros(128, 65536))
            self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        z = nn.functional.normalize(self.encoder_q(x), dim=1)
        head, self.encoder_q.fc = self.encoder_q.fc, nn.Identity()
        h = self.encoder_q(x)
        self.encoder_q.fc = head
        return h, z


def saved(model, path, **extra):
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 3, 32, 32))  # running statistics other than 0 and 1
    torch.save({"epoch": 7, "state_dict": nn.DataParallel(model).state_dict(), "optimizer": {}} | extra, path)
    return model.eval()


def check(model, folder, size, mean, std):
    """In float64, where rounding can't hide a difference; and the normalization through embed()."""
    images = torch.rand(2, 3, size, size)
    x = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    encoder = care_hub.load_encoder(folder)
    with torch.no_grad():
        np.testing.assert_allclose(encoder.embed(images).cpu(), model(x)[1], atol=5e-6)
        h, z = model.double()(x.double())
        encoder.double()
        np.testing.assert_allclose(encoder.features(x.double()), h, atol=1e-10)
        np.testing.assert_allclose(encoder(x.double()), z, atol=1e-10)


def layout(shared, name, model):
    """Our stand-in has the names and shapes of the real thing."""
    expected = json.loads(shared("reference/official_checkpoint_keys.json").read_text())["state_dict"][name]
    assert {f"module.{k}": list(v.shape) for k, v in model.state_dict().items()} == expected


@pytest.mark.parametrize("depth", ["resnet18", pytest.param("resnet50", marks=pytest.mark.launches)])
def test_cifar_checkpoints(depth, tmp_path):
    torch.manual_seed(0)
    options = argparse.Namespace(dataset_name="cifar100", lr=0.1)
    model = saved(PublicCifar(depth), tmp_path / "c.pth.tar", args=options, best_acc_1=1.0)
    care_hub_command("convert", tmp_path / "c.pth.tar", tmp_path / "out")
    check(model, tmp_path / "out", 32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    care = json.loads((tmp_path / "out" / "config.json").read_text())["care"]
    assert care["model"] == f"{depth}_cifar" and care["dataset"] == "cifar100"
    assert care["converted_from"] == "c.pth.tar" and care["epoch"] == 7


@pytest.mark.slow
def test_imagenet_checkpoints_of_both_methods(tmp_path):
    torch.manual_seed(0)
    model = saved(PublicImageNet(True), tmp_path / "i.pth.tar", arch="resnet50")
    convert_checkpoint(tmp_path / "i.pth.tar", tmp_path / "out")
    check(model, tmp_path / "out", 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    query = {k: v for k, v in model.float().state_dict().items() if k.startswith("encoder_q")}
    torch.save({"state_dict": query, "arch": "resnet50"}, tmp_path / "simclr.pth.tar")
    convert_checkpoint(tmp_path / "simclr.pth.tar", tmp_path / "simclr")
    of_moco, of_simclr = (tmp_path / name / "model.safetensors" for name in ("out", "simclr"))
    assert of_simclr.read_bytes() == of_moco.read_bytes()


def test_the_stand_ins_have_the_public_layout(shared):
    layout(shared, "cifar10_cifar100_stl10/resnet18", PublicCifar("resnet18"))
    layout(shared, "cifar10_cifar100_stl10/resnet50", PublicCifar("resnet50"))
    layout(shared, "imagenet100/simclr/resnet50", PublicImageNet(False))
    layout(shared, "imagenet100/moco/resnet50", PublicImageNet(True))


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


def test_anything_else_is_refused_with_what_was_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(content, match, **options):
        torch.save(content, "x.pth.tar")
        with pytest.raises(CareHubError, match=match):
            convert_checkpoint("x.pth.tar", "out", **options)
        assert not (tmp_path / "out").exists()

    strange = {"module.backbone.conv1.weight": torch.zeros(1)}
    refused({"state_dict": strange}, r"found keys like backbone\.conv1\.weight")
    refused([1, 2], "found list")
    refused({"state_dict": {}, "args": Evil()}, "can't be read safely")
    assert not (tmp_path / "evil-was-here").exists()
    model = PublicCifar("resnet18").state_dict()
    refused({"state_dict": model}, "pass `dataset_name`")
    assert "pass --dataset-name" in care_hub_command("convert", "x.pth.tar", "out", ok=False)
    shallow = {k: v for k, v in model.items() if not k.startswith("f.6")}
    refused({"state_dict": shallow}, "found 6 residual blocks")
    headless = {k: v for k, v in model.items() if not k.startswith("g.")}
    refused({"state_dict": headless}, "can't be converted")
    narrow = model | {"g.0.weight": torch.zeros(512, 100)}
    refused({"state_dict": narrow}, "should be", dataset_name="cifar10")
    (tmp_path / "x.pth.tar").write_bytes(b"not a checkpoint")
    with pytest.raises(CareHubError, match="can't be read safely"):
        convert_checkpoint("x.pth.tar", "out")
    with pytest.raises(CareHubError, match="no checkpoint"):
        convert_checkpoint("absent.pth.tar", "out")

"""Architectures: timm's registry plus ResNets for small images, and their twins in plain timm.

`*_cifar`: the published CIFAR form, a 3x3 stride-1 stem without a pool. `*_small`: a stem of stride 2,
in narrow networks that train on two CPU cores (`w16`: 16 channels in the first stage). timm can't build
these stems from a config, yet both have an exact twin in plain timm (`to_plain`), in which exports are
stored; `from_plain` is its inverse.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from .config import EncoderConfig
from .errors import CareHubError, suggest

# A timm model: an nn.Module with num_features, pretrained_cfg, reset_classifier, for which timm has no type.
Backbone = Any


class SmallImageResNet(ResNet):
    """timm's ResNet with a 3x3 stem of stride 1 or 2 and no pool."""

    conv1: nn.Conv2d

    def __init__(
        self,
        block: type[nn.Module],
        layers: tuple[int, ...],
        stem_stride: int = 1,
        in_chans: int = 3,
        **kwargs: Any,
    ):
        super().__init__(block, layers, in_chans=in_chans, **kwargs)
        width = self.conv1.out_channels
        self.conv1 = nn.Conv2d(in_chans, width, 3, stride=stem_stride, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for info, reduction in zip(self.feature_info, (1, 1, 2, 4, 8), strict=True):
            info["reduction"] = reduction * stem_stride


@dataclass(frozen=True)
class Stem:
    """How a small-image architecture is written in plain timm."""

    plain: str  # timm's architecture
    stride: int
    model_args: dict[str, list[int]] = field(default_factory=dict)

    @property
    def upsampling(self) -> int:
        """Plain timm sees the image this many times larger, by nearest neighbor."""
        return 4 // self.stride

    @property
    def kernel_places(self) -> Tensor:
        """Where the 3 rows (columns) of the small kernel go in the 7 of timm's, on the enlarged image."""
        return torch.tensor((0, 1, 5) if self.stride == 1 else (1, 3, 5))

    @property
    def pool_place(self) -> int:
        """Where a 3x3 kernel that replaces the pool has its only weight."""
        return 2 // self.stride


SMALL = {
    "resnet18_cifar": Stem("resnet18", 1),
    "resnet34_cifar": Stem("resnet34", 1),
    "resnet50_cifar": Stem("resnet50", 1),
    "resnet18_w16_cifar": Stem("resnet18", 1, {"channels": [16, 32, 64, 128]}),
    "resnet10_w16_small": Stem("resnet18", 2, {"channels": [16, 32, 64, 128], "layers": [1, 1, 1, 1]}),
    "resnet10_w32_small": Stem("resnet18", 2, {"channels": [32, 64, 128, 256], "layers": [1, 1, 1, 1]}),
}
BLOCKS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
CFG = {
    "num_classes": 0,
    "input_size": (3, 32, 32),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "first_conv": "conv1",
    "classifier": "fc",
}
default_cfgs = generate_default_cfgs(
    {name: CFG | {"pool_size": (4 // stem.stride,) * 2} for name, stem in SMALL.items()}
)


def _build(name: str, pretrained: bool, **kwargs: Any) -> SmallImageResNet:
    block, layers = BLOCKS[SMALL[name].plain]
    args = {"block": block, "layers": layers, "stem_stride": SMALL[name].stride}
    return build_model_with_cfg(SmallImageResNet, name, pretrained, **args | SMALL[name].model_args | kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """ResNet-18 with a 3x3 stem of stride 1 and no pool."""
    return _build("resnet18_cifar", pretrained, **kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """ResNet-34 with a 3x3 stem of stride 1 and no pool."""
    return _build("resnet34_cifar", pretrained, **kwargs)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """ResNet-50 with a 3x3 stem of stride 1 and no pool: that of the paper's CIFAR experiments."""
    return _build("resnet50_cifar", pretrained, **kwargs)


@register_model
def resnet18_w16_cifar(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """A quarter as wide as `resnet18_cifar`."""
    return _build("resnet18_w16_cifar", pretrained, **kwargs)


@register_model
def resnet10_w16_small(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """One block per stage, 16 to 128 channels, stem of stride 2: trains in minutes on two CPU cores."""
    return _build("resnet10_w16_small", pretrained, **kwargs)


@register_model
def resnet10_w32_small(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """Twice as wide as `resnet10_w16_small`."""
    return _build("resnet10_w32_small", pretrained, **kwargs)


def build_model(name: str, pretrained: bool = False, num_classes: int = 0, **kwargs: Any) -> Backbone:
    """A timm model by name, ours included; `num_classes=0` ends in pooled features.

    `pretrained`: with timm's weights. Raises CareHubError for an unknown name, with the nearest
    known one, and for what it can't be built with.
    """
    if not (isinstance(name, str) and timm.is_model(name)):
        near = suggest(name, timm.list_models()) or "; care_hub.list_models() shows them"
        raise CareHubError(f"there is no model '{name}'{near}.")
    if pretrained and name.split(".", 1)[0] in SMALL:
        known = "care_hub.list_models(pretrained=True) shows those there are"
        raise CareHubError(f"there are no pretrained weights for '{name}'; {known}.")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    except Exception as error:  # of whatever kind a constructor, or the way to the weights, gives
        reason = " ".join(str(error).split()) or type(error).__name__
        given = f" with {kwargs}" if kwargs else ""
        raise CareHubError(f"model '{name}' can't be built{given} ({reason}).") from error


def build_backbone(model: str, image_size: int) -> Backbone:
    """A network with random weights for images of `image_size` pixels, in channels_last.

    Raises CareHubError for an unknown name, and where patches do not fill an image.
    """
    size: dict[str, Any] = {}
    with suppress(RuntimeError):  # an unknown name or tag, of which `build_model` tells
        if timm.get_pretrained_cfg(model, allow_unregistered=False).fixed_input_size:
            size = {"img_size": image_size}
    backbone = build_model(model, **size).to(memory_format=torch.channels_last)
    for conv in filter(lambda module: isinstance(module, nn.Conv2d), backbone.modules()):
        if conv.in_channels < 16 and conv.kernel_size == (1, 1) != conv.stride:
            # In channels_last the CPU's backward pass of such a layer writes where it may not (torch 2.14).
            conv.weight.data = torch.empty(conv.weight.shape).copy_(conv.weight.data)  # in the usual layout
            conv.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    patch = max(to_2tuple(getattr(getattr(backbone, "patch_embed", None), "patch_size", None) or 1))
    if image_size % patch:
        near = max(1, round(image_size / patch)) * patch
        problem = f"{model} cuts images into patches of {patch} pixels, which do not fill {image_size}"
        raise CareHubError(f"{problem}; use `image_size={near}`.")
    return backbone


@torch.no_grad()
def feature_width(backbone: Backbone, image_size: int) -> int:
    """d of the (N, d) features of a network, by what it makes of a black image.

    timm's `num_features` is the width before the head, where some architectures have further
    layers. Raises CareHubError for a network that does not take images of `image_size` pixels, or
    gives no vectors.
    """
    training, name = backbone.training, backbone.pretrained_cfg["architecture"]
    try:
        shape = tuple(backbone.eval()(torch.zeros(1, 3, image_size, image_size)).shape)
    except Exception as error:
        problem = f"does not take images of {image_size} pixels ({error})"
        raise CareHubError(f"model '{name}' {problem}.") from error
    backbone.train(training)
    if len(shape) != 2:
        raise CareHubError(f"model '{name}' gives no vectors but {shape}.")
    return shape[1]


def timm_config(config: EncoderConfig, backbone: Backbone) -> dict[str, Any]:
    """timm's Hub schema: what `timm.create_model("hf-hub:...", pretrained=True)` and transformers read."""
    stem = SMALL.get(config.model)
    base = backbone.pretrained_cfg
    size = config.image_size
    args: dict[str, Any] = {}
    if stem:
        size *= stem.upsampling
        args = {"replace_stem_pool": True} | stem.model_args
    elif base.get("fixed_input_size"):
        args = {"img_size": size}
    return {
        "architecture": stem.plain if stem else config.model,
        "num_classes": 0,
        "num_features": backbone.num_features,
        "dtype": "float32",  # to compute in, for transformers: the file may have float16
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "interpolation": "nearest" if stem else "bicubic",
            "crop_pct": 1.0 if stem else config.crop_pct,  # a twin takes images that are cropped already
            "mean": list(config.mean),
            "std": list(config.std),
            "first_conv": base["first_conv"],
            "classifier": base["classifier"],
        },
        **({"model_args": args} if args else {}),
    }


def to_plain(state: dict[str, Tensor], stem: Stem) -> dict[str, Tensor]:
    """Weights of a SmallImageResNet -> those of plain timm's `stem.plain` with `replace_stem_pool`.

    Exactly equivalent in eval mode on an image enlarged `stem.upsampling` times by nearest
    neighbor.
    """
    small = state["conv1.weight"]
    width, places = len(small), stem.kernel_places
    kernel = small.new_zeros(*small.shape[:2], 7, 7)
    kernel[:, :, places[:, None], places[None, :]] = small
    pool = small.new_zeros(width, width, 3, 3)
    pool[:, :, stem.pool_place, stem.pool_place] = torch.eye(width, dtype=small.dtype)
    # Kernels may be stored in half precision, vectors not.
    norm = nn.BatchNorm2d(width, dtype=state["bn1.weight"].dtype).state_dict(prefix="maxpool.1.")
    norm["maxpool.1.running_var"] -= 1e-5  # BatchNorm adds its eps back
    return state | {"conv1.weight": kernel, "maxpool.0.weight": pool} | norm


def from_plain(state: dict[str, Tensor], stem: Stem) -> dict[str, Tensor]:
    """The inverse of `to_plain`, bit for bit. Raises CareHubError for weights that are not such a twin."""
    places = stem.kernel_places
    small = {k: v for k, v in state.items() if not k.startswith("maxpool.")}
    try:
        small["conv1.weight"] = state["conv1.weight"][:, :, places[:, None], places[None, :]].contiguous()
        twin = to_plain(small, stem)
        stem_keys = [k for k in state if k.startswith(("maxpool.", "conv1."))]
        same = all(torch.equal(twin[k].to(state[k].dtype), state[k]) for k in stem_keys)
    except (KeyError, IndexError, RuntimeError):
        same = False
    if not same:
        raise CareHubError(
            "these weights are no small-image ResNet in plain timm; the export is damaged or not ours."
        )
    return small

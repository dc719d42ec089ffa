"""Architectures: timm's registry plus ResNets for small images.

`*_cifar`: the published CIFAR form, a 3x3 stride-1 stem without a pool. `*_small`: a stem of stride 2, in narrow networks
that train on two CPU cores (`w16`: 16 channels in the first stage). timm can't build these stems from a config, yet both have an exact twin
in plain timm (`to_plain`), in which exports are stored; `from_plain` is its inverse.
"""

from dataclasses import dataclass, field

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from .errors import CareHubError, suggest


class SmallImageResNet(ResNet):
    """timm's ResNet with a 3x3 stem of stride 1 or 2 and no pool."""

    def __init__(self, block, layers, stem_stride: int = 1, in_chans: int = 3, **kwargs):
        super().__init__(block, layers, in_chans=in_chans, **kwargs)
        self.conv1 = nn.Conv2d(in_chans, self.conv1.out_channels, 3, stride=stem_stride, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for info, reduction in zip(self.feature_info, (1, 1, 2, 4, 8), strict=True):
            info["reduction"] = reduction * stem_stride


@dataclass(frozen=True)
class Stem:
    """How a small-image architecture is written in plain timm."""

    plain: str  # timm's architecture
    stride: int
    model_args: dict = field(default_factory=dict)

    @property
    def upsampling(self) -> int:
        """Plain timm sees the picture this many times larger, by nearest neighbour."""
        return 4 if self.stride == 1 else 2

    @property
    def taps(self) -> tuple[int, int, int]:
        """Where the 3 taps of the small kernel go in the 7 of timm's, which then reads the upsampled picture."""
        return (0, 1, 5) if self.stride == 1 else (1, 3, 5)

    @property
    def pool_tap(self) -> int:
        return 2 if self.stride == 1 else 1


SMALL = {
    "resnet18_cifar": Stem("resnet18", 1),
    "resnet34_cifar": Stem("resnet34", 1),
    "resnet50_cifar": Stem("resnet50", 1),
    "resnet18_w16_cifar": Stem("resnet18", 1, {"channels": [16, 32, 64, 128]}),
    "resnet10_w16_small": Stem("resnet18", 2, {"channels": [16, 32, 64, 128], "layers": [1, 1, 1, 1]}),
    "resnet10_w32_small": Stem("resnet18", 2, {"channels": [32, 64, 128, 256], "layers": [1, 1, 1, 1]}),
}
_BLOCKS = {"resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet34": (BasicBlock, (3, 4, 6, 3)), "resnet50": (Bottleneck, (3, 4, 6, 3))}

default_cfgs = generate_default_cfgs(
    {
        name: dict(
            num_classes=0, input_size=(3, 32, 32), pool_size=(4 // stem.stride, 4 // stem.stride), crop_pct=1.0,
            interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), first_conv="conv1", classifier="fc",
        )
        for name, stem in SMALL.items()
    }
)  # fmt: skip


def _register(name: str) -> None:
    stem = SMALL[name]
    block, layers = _BLOCKS[stem.plain]

    def build(pretrained: bool = False, **kwargs) -> SmallImageResNet:
        args = {"block": block, "layers": layers, "stem_stride": stem.stride} | stem.model_args | kwargs
        return build_model_with_cfg(SmallImageResNet, name, pretrained, **args)

    build.__name__ = name
    build.__module__ = __name__
    build.__doc__ = f"{stem.plain} {stem.model_args or ''} with a 3x3 stem of stride {stem.stride}, no pool.".replace("  ", " ")
    globals()[name] = register_model(build)


for _name in SMALL:
    _register(_name)


def create_model(name: str, pretrained: bool = False, num_classes: int = 0, **kwargs) -> nn.Module:
    """A backbone by name, for fine-tuning: ours or any of timm's. `num_classes=0` (default) ends in pooled features.

    `pretrained`: CARE weights where the registry has some for `name` (`architecture` or `architecture.tag`), else timm's.
    Raises CareHubError for an unknown name, with the nearest known one.
    """
    from .registry import find

    if pretrained and (entry := find(name)):
        from .encoder import Encoder

        if kwargs:
            raise CareHubError(f"'{entry.name}' comes as it was trained; {', '.join(kwargs)} can't be set with pretrained=True.")
        backbone = Encoder.from_pretrained(entry.name).backbone.train()
        if num_classes:
            backbone.reset_classifier(num_classes)
        return backbone
    if not timm.is_model(name):
        near = suggest(name, timm.list_models())
        raise CareHubError(f"there is no model '{name}'{near or '; care_hub.list_models() shows them'}.")
    if pretrained and name.split(".", 1)[0] in SMALL:
        raise CareHubError(f"there are no pretrained weights for '{name}'; care_hub.list_models(pretrained=True) shows those there are.")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    except (TypeError, AssertionError) as error:
        raise CareHubError(f"model '{name}' can't be built with {kwargs}: {error}.") from error


def to_plain(state: dict[str, Tensor], stem: Stem) -> dict[str, Tensor]:
    """Weights of a SmallImageResNet -> those of plain timm's `stem.plain` with `replace_stem_pool`, exactly equivalent
    in eval mode on a picture enlarged `stem.upsampling` times by nearest neighbour."""
    small = state["conv1.weight"]
    width = len(small)
    kernel = small.new_zeros(*small.shape[:2], 7, 7)
    taps = torch.tensor(stem.taps)
    kernel[:, :, taps[:, None], taps[None, :]] = small
    pool = small.new_zeros(width, width, 3, 3)
    pool[:, :, stem.pool_tap, stem.pool_tap] = torch.eye(width, dtype=small.dtype)
    vector = state["bn1.weight"]  # kernels may be stored in half precision, vectors not
    identity = {
        "maxpool.0.weight": pool,
        "maxpool.1.weight": vector.new_ones(width),
        "maxpool.1.bias": vector.new_zeros(width),
        "maxpool.1.running_mean": vector.new_zeros(width),
        "maxpool.1.running_var": vector.new_ones(width) - 1e-5,  # BatchNorm adds its eps back
        "maxpool.1.num_batches_tracked": torch.tensor(0),
    }
    return state | {"conv1.weight": kernel} | identity


def from_plain(state: dict[str, Tensor], stem: Stem) -> dict[str, Tensor]:
    """The inverse of `to_plain`, bit for bit; refuses weights that are not such a twin."""
    taps = torch.tensor(stem.taps)
    small = {k: v for k, v in state.items() if not k.startswith("maxpool.")}
    try:
        small["conv1.weight"] = state["conv1.weight"][:, :, taps[:, None], taps[None, :]].contiguous()
        twin = to_plain(small, stem)
        same = all(torch.equal(twin[k].to(v.dtype), v) for k, v in state.items() if k.startswith(("maxpool.", "conv1.")))
    except (KeyError, IndexError, RuntimeError):
        same = False
    if not same:
        raise CareHubError("these weights are not a small-image ResNet written in plain timm; the export is damaged or not ours.")
    return small

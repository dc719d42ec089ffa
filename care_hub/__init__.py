"""Contrastive Augmentation-induced Rotational Equivariance: train, load and use CARE image encoders.

Names are resolved on first use, so that `import care_hub` stays light.
"""

from importlib import import_module
from typing import Any

from .errors import CareHubError

__version__ = "0.2.0"

_HOMES = {
    "Encoder": "encoder",
    "load_encoder": "factory",
    "load_linear_head": "factory",
    "load_classifier": "factory",
    "load_rotations": "factory",
    "create_model": "factory",
    "list_models": "factory",
    "LinearHead": "hub.linear_head",
    "RotationSet": "hub.rotation_set",
    "register_encoder": "hub.registry",
    "Rotation": "rotation",
    "fingerprint_of": "embed_folder",
    "TrainConfig": "config",
    "train": "training.trainer",
    "Callbacks": "training.progress",
}
_MODULES = ("augment", "losses", "metrics", "models", "registry", "rotation")

__all__ = ["CareHubError", *_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    elif name in _MODULES:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module 'care_hub' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

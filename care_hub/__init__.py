"""Contrastive Augmentation-induced Rotational Equivariance: train, load and use CARE image encoders.

Names are resolved on first use, so that `import care_hub` stays light.
"""

from importlib import import_module

from .errors import CareHubError

__version__ = "0.1.0"

_HOMES = {
    "Encoder": "encoder",
    "load_encoder": "encoder",
    "create_model": "models",
    "list_models": "registry",
    "register_encoder": "registry",
    "LinearHead": "classifier",
    "load_linear_head": "classifier",
    "load_classifier": "classifier",
    "Rotation": "rotation",
    "TrainConfig": "config",
    "train": "trainer",
}
_MODULES = ("augment", "losses", "models", "registry", "rotation")

__all__ = ["CareHubError", *_HOMES, *_MODULES]


def __getattr__(name: str):
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    elif name in _MODULES:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module 'care_hub' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *__all__])

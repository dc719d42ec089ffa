"""The export folder: config.json in timm's schema with a `care` object, and safetensors files. Nothing in one is trusted."""

import hashlib
import json
import math
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import CareHubError
from .models import SMALL

CONFIG_BYTES = 1 << 20


def export_folder(source: str | Path) -> Path:
    """An export folder, or a run folder that holds one -> the export folder."""
    folder = Path(source)
    folder = folder / "export" if (folder / "export" / "config.json").is_file() else folder
    if not (folder / "config.json").is_file():
        raise CareHubError(f"'{source}' is not an export folder or a run folder with one (no config.json there).")
    return folder


def read_config(folder: Path) -> dict:
    """config.json, its `care` object checked for what rebuilding the encoder takes."""
    path = folder / "config.json"
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
        care = config["care"]
        size, numbers = care["image_size"], [*care["mean"], *care["std"], care["crop_pct"]]
        head, sums = care.get("projection"), care.setdefault("sha256", {})
        if not isinstance(care["model"], str) or type(size) is not int or not 1 <= size <= 2048:
            raise ValueError(f"model {care['model']!r} at image_size {size!r}")
        finite = len(numbers) == 7 and all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
        if not finite or min(numbers[3:6]) <= 0 or not 0.1 <= numbers[6] <= 1:
            raise ValueError(f"mean, std, crop_pct {numbers}")
        if head is not None and set(head) != {"inputs", "hidden", "outputs", "norm"}:
            raise ValueError(f"projection {head}")
        if not isinstance(sums, dict):
            raise ValueError("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CareHubError(f"'{path}' is not a care_hub configuration ({error!r:.200}).") from error
    return config


def projection_of(head: dict[str, Tensor]) -> dict:
    """The shape of a projection head, from its weights."""
    first, last = head.get("0.weight"), head.get("3.weight", head.get("2.weight"))
    if first is None or last is None or first.ndim != 2 or last.ndim != 2:
        return {}
    return {"inputs": first.shape[1], "hidden": first.shape[0], "outputs": last.shape[0], "norm": "3.weight" in head}


def timm_config(care: dict, backbone: nn.Module) -> dict:
    """timm's Hub schema: what `timm.create_model("hf-hub:...", pretrained=True)` reads."""
    stem = SMALL.get(care["model"])
    size = care["image_size"] * (stem.upsampling if stem else 1)
    base = backbone.pretrained_cfg
    args = {"replace_stem_pool": True} | stem.model_args if stem else {}
    if not stem and base.get("fixed_input_size"):
        args = {"img_size": size}
    return {
        "architecture": stem.plain if stem else care["model"],
        "num_classes": 0,
        "num_features": backbone.num_features,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "interpolation": "nearest" if stem else "bicubic",
            "crop_pct": care["crop_pct"],
            "mean": care["mean"],
            "std": care["std"],
            "first_conv": base["first_conv"],
            "classifier": base["classifier"],
        },
        **({"model_args": args} if args else {}),
    }


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()
        )


def check_sums(folder: Path, sums: dict[str, str]) -> None:
    for name, expected in sums.items():
        path = folder / Path(name).name
        if path.is_file() and sha256(path) != expected:
            raise CareHubError(f"'{path}' is damaged: its sha256 is not the one in config.json; fetch or export it again.")


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise CareHubError(f"'{path}' is missing; the export is incomplete.") from None
    except (SafetensorError, OSError) as error:
        raise CareHubError(f"'{path}' is not a complete safetensors file ({error}).") from error
    for name, tensor in state.items():
        if tensor.is_floating_point() and not math.isfinite(float(tensor.double().abs().sum())):
            raise CareHubError(f"'{path}' holds values that are not finite numbers (in {name}).")
    return state


def fill(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load `state` into `module`; CareHubError with the first name or shape that differs."""
    wanted = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in state.items()}
    if wanted != found:
        wrong = next(k for k in [*wanted, *found] if wanted.get(k) != found.get(k))
        raise CareHubError(f"'{path}' does not fit its architecture: {wrong} should be {wanted.get(wrong)} and is {found.get(wrong)}.")
    module.load_state_dict(state)

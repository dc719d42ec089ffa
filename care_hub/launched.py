"""Accelerate's settings, as it puts them into the environment of what it launches: taken over or refused."""

import os
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from accelerate.utils import TorchDynamoPlugin

from .errors import CareHubError

# Settings that divide a network among processes: ACCELERATE_ and this name in the environment.
SHARDED = {
    "USE_FSDP": "FSDP",
    "USE_DEEPSPEED": "DeepSpeed",
    "USE_MEGATRON_LM": "Megatron-LM",
    "USE_PARALLELISM_CONFIG": "parallelism config",
}


def launched_options() -> dict[str, Any]:
    """What Accelerate was launched with, by the names of TrainConfig, without what is left at "no": so it
    says where nobody has chosen.

    Raises CareHubError for settings that are not supported.
    """
    for name, title in SHARDED.items():
        if _is_on(name):
            why = "an encoder fits on every device, so processes hold replicas of it (DDP)"
            what = "choose GPUs or CPUs without it in `accelerate config`"
            raise CareHubError(f"Accelerate's {title} (ACCELERATE_{name}) is not supported: {why}; {what}.")
    steps, mixed = _setting("GRADIENT_ACCUMULATION_STEPS"), _setting("MIXED_PRECISION")
    if steps and not (steps.isdecimal() and int(steps)):
        text = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS must be a whole number from 1 on"
        raise CareHubError(f"{text}, got '{steps}'.")
    if mixed not in ("", "no", "bf16", "fp16"):  # fp8 puts other layers in the place of some
        _refuse("mixed_precision", mixed, "is not supported", ("bf16", "fp16", "no"))
    if mixed == "fp16" and on_cpu():
        _refuse("mixed_precision", mixed, "needs a GPU", ("bf16", "no"))
    chosen = {"gradient_accumulation": int(steps or 0), "mixed_precision": mixed.removeprefix("no")}
    chosen["compile"] = bool(compile_arguments())
    return {name: value for name, value in chosen.items() if value}


def compile_arguments() -> dict[str, Any]:
    """Arguments of torch.compile: Accelerate's dynamo settings, none where its backend is "no".

    Raises CareHubError for those that are not supported.
    """
    backend, mode = _setting("DYNAMO_BACKEND"), _setting("DYNAMO_MODE") or "default"
    if backend in ("", "no"):
        return {}
    if _is_on("DYNAMO_USE_REGIONAL_COMPILATION"):  # whose pieces would be saved under other names
        _refuse("dynamo_use_regional_compilation", "true", "is not supported", ("false",))
    if backend not in (backends := torch.compiler.list_backends(exclude_tags=())):
        _refuse("dynamo_backend", backend, "is not installed", backends)
    if mode not in (modes := torch._inductor.list_mode_options()):
        _refuse("dynamo_mode", mode, "is not supported", modes)
    return TorchDynamoPlugin().to_kwargs()


def on_cpu() -> bool:
    """Whether to tell Accelerate that there is no GPU: else it does not see the processes of torchrun."""
    return _is_on("USE_CPU") or not torch.accelerator.is_available()


def _refuse(name: str, value: str, why: str, choices: Iterable[str]) -> NoReturn:
    setting = f"Accelerate's {name} '{value}' (ACCELERATE_{name.upper()})"
    raise CareHubError(f"{setting} {why}; choose from: {', '.join(choices)}.")


def _setting(name: str) -> str:
    return os.environ.get(f"ACCELERATE_{name}", "").strip().lower()


def _is_on(name: str) -> bool:
    return _setting(name) not in ("", "0", "n", "no", "f", "false", "off")

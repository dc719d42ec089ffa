"""Accelerate's settings: each is taken over, or refused by its name."""

import pytest
import torch

from care_hub.errors import CareHubError
from care_hub.launched import compile_arguments, launched_options
from care_hub.training.trainer import precision

TAKEN_OVER = [
    ({}, {}),
    ({"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "USE_FSDP": "false"}, {}),  # where nobody has chosen
    ({"MIXED_PRECISION": "bf16", "GRADIENT_ACCUMULATION_STEPS": "3"}, ("bf16", 3)),
    ({"DYNAMO_BACKEND": "INDUCTOR", "DYNAMO_MODE": "max-autotune"}, {"compile": True}),
]
REFUSED = [
    ("USE_FSDP", "true", "FSDP .* replicas"),
    ("USE_DEEPSPEED", "true", "DeepSpeed .* replicas"),
    ("USE_MEGATRON_LM", "True", "Megatron-LM .* replicas"),
    ("USE_PARALLELISM_CONFIG", "1", "parallelism config .* replicas"),
    ("MIXED_PRECISION", "fp8", "'fp8' .* choose from: bf16, fp16, no"),
    ("DYNAMO_BACKEND", "TENSORRT", "'tensorrt' .* is not installed; choose from: .*inductor"),
    ("GRADIENT_ACCUMULATION_STEPS", "0", "a whole number from 1 on, got '0'"),
]


def set_all(monkeypatch, settings: dict[str, str]):
    for name, value in settings.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)


@pytest.mark.parametrize(("settings", "options"), TAKEN_OVER)
def test_what_accelerate_was_launched_with_are_options(settings, options, monkeypatch):
    set_all(monkeypatch, settings)
    if isinstance(options, tuple):
        options = dict(zip(("mixed_precision", "gradient_accumulation"), options, strict=True))
    assert launched_options() == options


@pytest.mark.parametrize(("name", "value", "sentence"), REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(name, value, sentence, monkeypatch):
    set_all(monkeypatch, {name: value})
    with pytest.raises(CareHubError, match=sentence) as caught:
        launched_options()
    assert f"ACCELERATE_{name}" in str(caught.value)


def test_dynamo_settings_are_arguments_of_torch_compile(monkeypatch):
    assert compile_arguments() == {}
    set_all(monkeypatch, {"DYNAMO_BACKEND": "AOT_EAGER", "DYNAMO_USE_DYNAMIC": "True"})
    assert compile_arguments() == {"backend": "aot_eager", "dynamic": True}
    for name, value in (("DYNAMO_MODE", "fastest"), ("DYNAMO_USE_REGIONAL_COMPILATION", "True")):
        with monkeypatch.context() as patch, pytest.raises(CareHubError, match=f"ACCELERATE_{name}"):
            set_all(patch, {name: value})
            compile_arguments()


def test_half_precision_needs_a_gpu_and_a_tpu_is_refused(monkeypatch):
    set_all(monkeypatch, {"USE_CPU": "true", "MIXED_PRECISION": "fp16"})
    with pytest.raises(CareHubError, match=r"'fp16' .* needs a GPU; choose from: bf16, no"):
        launched_options()
    with pytest.raises(CareHubError, match="a TPU is not supported"):
        precision("auto", torch.device("xla"))

"""Fine-tuning: another encoder for each seed, whatever else the process does."""

import pytest
import torch
from accelerate import Accelerator

from care_hub.config import DataConfig, EvalConfig
from care_hub.data.sources import load_splits
from care_hub.distributed import inference_accelerator
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.evaluate import finetune as module
from care_hub.evaluate.features import labeled
from care_hub.evaluate.finetune import finetune


@pytest.mark.launches
def test_fine_tuning_is_repeatable_and_leaves_encoder_and_random_numbers_alone(tiny_run, photos):
    encoder, accelerator = Encoder.from_pretrained(tiny_run), Accelerator(cpu=True)
    data = DataConfig("imagefolder", data_root=str(photos))
    train, test = labeled("imagefolder", *load_splits(data, size=32, progress=False))
    config = EvalConfig(
        "imagefolder", encoder="here", protocol="finetune", epochs=2, seeds=2, output_dir="there"
    )
    encoder.set_contrastive_head(True)
    fingerprint, state = encoder.fingerprint, torch.get_rng_state()
    heads, tuned = finetune(encoder, train, test, accelerator, config)
    assert encoder.fingerprint == fingerprint and torch.equal(torch.get_rng_state(), state)
    assert tuned.projection is tuned.contrastive_head is None and encoder.contrastive_head is not None
    assert [head.metrics["seed"] for head in heads] == [0, 1]
    assert not torch.equal(heads[0].weight, heads[1].weight)
    torch.rand(1)
    again, same = finetune(encoder, train, test, accelerator, config)
    assert same.fingerprint == tuned.fingerprint != fingerprint
    assert torch.equal(again[1].weight, heads[1].weight)


@pytest.mark.launches
def test_fine_tuning_accumulates_as_accelerate_was_told(tiny_run, photos, monkeypatch, caplog):
    encoder = Encoder.from_pretrained(tiny_run)
    data = DataConfig("imagefolder", data_root=str(photos))
    train, test = labeled("imagefolder", *load_splits(data, size=32, progress=False))
    config = EvalConfig("imagefolder", encoder="here", protocol="finetune", epochs=2, output_dir="there")
    steps, losses, lr_at, backward = [], [], module.lr_at, Accelerator.backward
    monkeypatch.setattr(module, "lr_at", lambda step, *more: steps.append(step) or lr_at(step, *more))
    monkeypatch.setattr(
        Accelerator, "backward", lambda self, loss: losses.append(loss) or backward(self, loss)
    )
    for count, expected in (("", (2, 2)), ("3", (2, 6))):  # one step an epoch: all 48 images
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", count)
        steps.clear()
        losses.clear()
        with caplog.at_level("INFO", "care_hub"):
            finetune(encoder, train, test, inference_accelerator(), config)
        assert (len(steps), len(losses)) == expected and steps == [0, 1]
        assert ("with gradient_accumulation_steps 3, as Accelerate" in caplog.text) == bool(count)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "100")
    with pytest.raises(CareHubError, match="48 training images do not make 100 batches"):
        finetune(encoder, train, test, inference_accelerator(), config)

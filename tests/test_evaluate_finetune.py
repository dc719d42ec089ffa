"""Fine-tuning: another encoder for each seed, whatever else the process does."""

import torch
from accelerate import Accelerator

from care_hub.config import DataConfig, EvalConfig
from care_hub.data.sources import load_splits
from care_hub.encoder import Encoder
from care_hub.evaluate.features import labeled
from care_hub.evaluate.finetune import finetune


def test_fine_tuning_is_repeatable_and_leaves_encoder_and_random_numbers_alone(tiny_run, photos):
    encoder, accelerator = Encoder.from_pretrained(tiny_run), Accelerator(cpu=True)
    data = DataConfig("imagefolder", data_root=str(photos))
    train, test = labeled("imagefolder", *load_splits(data, size=32, progress=False))
    config = EvalConfig(
        "imagefolder", encoder="here", protocol="finetune", epochs=2, seeds=2, output_dir="there"
    )
    fingerprint, state = encoder.fingerprint, torch.get_rng_state()
    heads, tuned = finetune(encoder, train, test, accelerator, config)
    assert encoder.fingerprint == fingerprint and torch.equal(torch.get_rng_state(), state)
    assert [head.metrics["seed"] for head in heads] == [0, 1]
    assert not torch.equal(heads[0].weight, heads[1].weight)
    torch.rand(1)
    again, same = finetune(encoder, train, test, accelerator, config)
    assert same.fingerprint == tuned.fingerprint != fingerprint
    assert torch.equal(again[1].weight, heads[1].weight)

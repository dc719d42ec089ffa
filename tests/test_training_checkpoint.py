"""Checkpoints: whole or absent, and of the moment at which they were asked for."""

import pytest
import torch

from care_hub.errors import CareHubError
from care_hub.training.checkpoint import CheckpointWriter, load_checkpoint


def test_a_checkpoint_that_can_not_be_written_ends_in_a_sentence(tmp_path):
    writer = CheckpointWriter(tmp_path / "file" / "checkpoints")
    (tmp_path / "file").write_text("no folder")
    writer.save(3, {"w": torch.zeros(1)}, {"state": {}, "param_groups": []}, {})
    with pytest.raises(CareHubError, match="checkpoint of step 3 can't be written"):
        writer.wait()


def test_a_checkpoint_holds_the_moment_at_which_it_was_asked_for(tmp_path):
    writer, weights = CheckpointWriter(tmp_path), torch.zeros(3_000_000)
    writer.save(1, {"w": weights}, {"state": {0: {"buffer": weights}}, "param_groups": []}, {})
    weights.fill_(1)  # training goes on
    writer.wait()
    model, optimizer, extra = load_checkpoint(tmp_path)
    assert not model["w"].any() and not optimizer["state"][0]["buffer"].any() and extra["step"] == 1

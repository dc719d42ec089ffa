"""Options: checked where they are given, described once, read from YAML also by former names."""

import dataclasses
import json

import pytest
import yaml
from helpers import ROOT

from care_hub.config import DataConfig, EncoderConfig, EvalConfig, TrainConfig, read_yaml, to_yaml
from care_hub.errors import CareHubError


def test_every_option_is_described_and_has_a_group():
    for config in (DataConfig, TrainConfig, EvalConfig):
        for option in dataclasses.fields(config):
            assert option.metadata["help"] and option.metadata["group"], option.name


def test_paths_and_names_of_this_machine_are_not_published():
    published = TrainConfig(data_root="/home/ann", run_name="secret").published()
    assert published["lr"] == TrainConfig.lr and published["image_column"] is None
    private = {
        "data_root",
        "save_root",
        "run_name",
        "resume",
        "push_to_hub",
        "dry_run",
        "log_with",
        "num_workers",
    }
    assert not private & published.keys()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "`batch_size` must be positive, got 0."),
        ({"lr": -1}, "`lr` can't be negative"),
        ({"blur_kernel_size": 4}, "`blur_kernel_size` must be odd"),
        ({"optimizer": "adma"}, "`optimizer` can't be 'adma', did you mean 'adam'?"),
        ({"resume": True}, "`resume` needs `run_name`"),
        ({"weight": 0, "loss_subtype": "none"}, "no loss at all"),
        ({"momentum_encoder": 2}, "must lie in"),
        ({"method": "moco", "loss_subtype": "uniformity"}, "SimCLR's loss"),
        ({"method": "moco", "queue_size": 100}, "the nearest is 128"),
        ({"batch_size": 64, "equivariant_batch_size": 24}, "the nearest that does is 16"),
        ({"batch_size": 100, "equiv_splits": 16}, "the nearest that works is 20"),
    ],
)
def test_values_that_can_not_work_are_refused_in_one_sentence(options, sentence):
    with pytest.raises(CareHubError) as refused:
        TrainConfig(**options)
    assert sentence in str(refused.value) and "--" not in str(refused.value)


def test_options_of_an_evaluation_are_checked_too():
    def refused(match, **options):
        with pytest.raises(CareHubError, match=match):
            EvalConfig(**({"dataset_name": "shapes", "encoder": "here"} | options))

    refused("`encoder` is missing", encoder="")
    refused("`dataset_name` is missing", dataset_name="")
    refused("`label_fraction` must lie in", label_fraction=2.0)
    refused("`augmented_copies` belongs to", augmented_copies=2)
    refused("`output_dir`", protocol="finetune")
    assert EvalConfig("shapes", encoder="here", label_fraction=0.1).protocol_name == (
        "linear probe, 10 % of the labels"
    )


def test_processes_that_do_not_divide_the_batch():
    with pytest.raises(
        CareHubError, match="`equiv_splits=4` does not divide among 3 processes; the nearest that"
    ):
        TrainConfig(batch_size=48, equiv_splits=4).check_processes(3)


def test_the_queue_holds_at_most_half_the_data_set():
    config = TrainConfig(method="moco", batch_size=64)
    assert (
        config.queue_for(5000) == 2496 and config.queue_for(1_000_000) == 65536 and config.queue_for(64) == 64
    )


def test_what_is_written_is_read_again_also_under_former_names(tmp_path):
    config = TrainConfig(jitter=[0.1, 0.2, 0.3, 0.4], grayscale=0.3, blur_kernel_size=5)
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(config))
    assert TrainConfig(**read_yaml(file)) == config
    former = yaml.safe_load(file.read_text())
    former["greyscale"], former["blur-taps"] = former.pop("grayscale"), former.pop("blur_kernel_size")
    file.write_text(yaml.safe_dump(former))
    assert TrainConfig(**read_yaml(file)) == config


def test_bad_configuration_files(tmp_path):
    file = tmp_path / "c.yaml"
    for text, sentence in [
        ("epoch: 3", "did you mean 'epochs'"),
        ("- 1", "must be a mapping"),
        ("a: [", "not valid YAML"),
    ]:
        file.write_text(text)
        with pytest.raises(CareHubError, match=sentence):
            read_yaml(file)
    with pytest.raises(CareHubError, match="can't be read"):
        read_yaml(tmp_path / "absent.yaml")


def test_the_record_of_an_encoder_is_read_and_written_unchanged():
    path = ROOT / "care_hub" / "pretrained" / "resnet10_w16_small.care_shapes" / "config.json"
    care = json.loads(path.read_text())["care"]
    config = EncoderConfig.from_json(care)
    renamed = care["training"] | {
        "grayscale": care["training"].get("greyscale", care["training"].get("grayscale"))
    }
    assert config.training["grayscale"] == renamed["grayscale"] and "greyscale" not in config.training
    again = config.to_json()
    assert {k: v for k, v in again.items() if k != "training"} == {
        k: v for k, v in care.items() if k != "training"
    }
    assert EncoderConfig.from_json(again) == config
    strange = EncoderConfig.from_json(care | {"converted_from": "x.pth.tar", "epoch": 3})
    assert strange.extra == {"converted_from": "x.pth.tar", "epoch": 3} and strange.to_json()["epoch"] == 3

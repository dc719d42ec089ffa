"""Options: checked where they are given, described once, read from YAML also by former names."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import ROOT

from care_hub.config import (
    PUBLIC_CODE,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    TrainConfig,
    read_yaml,
    to_yaml,
    typed_options,
)
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
        "project",
        "user",
        "log_freq",
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
        ({"steering_head": True, "views": "shared"}, "use `views='separate'`"),
        ({"steering_head": True, "loss_subtype": "none"}, "leave `steering_head` out"),
        ({"steering_temperature": 0}, "`steering_temperature` must be positive"),
        ({"steering_uniformity": -0.1}, "`steering_uniformity` can't be negative"),
        ({"momentum_encoder": 2}, "must lie in"),
        ({"method": "moco", "loss_subtype": "uniformity"}, "SimCLR's loss"),
        ({"method": "moco", "queue_size": 100}, "the nearest is 128"),
        ({"batch_size": 64, "equivariant_batch_size": 24}, "the nearest that does is 16"),
        ({"batch_size": 100, "equiv_splits": 16}, "the nearest that works is 20"),
        ({"equivariant_batch_size": 0}, "`equivariant_batch_size` must be positive"),
        ({"log_freq": 0}, "`log_freq` must be positive"),
        ({"grayscale": 1.5}, "`grayscale` must lie in [0, 1], got 1.5."),
        ({"equivariance_flip": -1}, "`equivariance_flip` must lie in [0, 1], got -1.0."),
        ({"equivariance_crop_scale": 0}, "`equivariance_crop_scale` must lie in (0, 1]"),
        ({"equivariance_jitter": [0.1, 0.1, -0.1, 0.1]}, "`equivariance_jitter` can't be negative"),
        ({"views": "shared", "equivariance_jitter_p": 1}, "`equivariance_jitter_p` needs a second pair"),
        ({"views": "shared", "equivariance_crop": "shared"}, "`equivariance_crop='shared'` needs a second"),
        ({"weight_start_epochs": 20}, "`weight_start_epochs=20` leaves none of `epochs=20` to the"),
        ({"weight_start_epochs": 1, "loss_subtype": "none"}, "leaves no loss before that"),
        ({"crop_scale": 0}, "`crop_scale` must lie in (0, 1]"),
        ({"jitter": [0.1, 0.1, -0.1, 0.1]}, "`jitter` can't be negative"),
        ({"momentum": -0.9}, "`momentum` must lie in [0, 1]"),
        ({"dataset_name": ""}, "`dataset_name` is missing."),
        ({"freeze_backbone": True}, "`freeze_backbone` needs `init`"),
        (
            {"init": "x.y", "freeze_backbone": True, "steering_head": True, "weight_start_epochs": 1},
            "must be 0: over a frozen backbone",
        ),
    ],
)
def test_values_that_can_not_work_are_refused_in_one_sentence(options, sentence):
    with pytest.raises(CareHubError) as refused:
        TrainConfig(**options)
    assert sentence in str(refused.value) and "--" not in str(refused.value)


USUAL = [
    ("lr: 1e-3", "lr", 0.001),
    ("lr: 1", "lr", 1.0),
    ("epochs: 3.0", "epochs", 3),
    ("epochs: '3'", "epochs", 3),
    ("seed: 1152921504606846977", "seed", 2**60 + 1),
    ("mixed_precision: no", "mixed_precision", "no"),
    ("mixed_precision: BF16", "mixed_precision", "bf16"),
    ("optimizer: Adam", "optimizer", "adam"),
    ("log_with: null", "log_with", "none"),
    ("compile: on", "compile", True),
    ("compile: 'False'", "compile", False),
    ("jitter: [0, 1e-1, '0.2', 0.3]", "jitter", (0.0, 0.1, 0.2, 0.3)),
    ("max_steps: null", "max_steps", None),
    ("run_name: '007'", "run_name", "007"),
    ("equivariance_crop: Shared", "equivariance_crop", "shared"),
    ("equivariance_crop: no", "equivariance_crop", False),
    ("equivariance_jitter: [0, 1e-1, '0.2', 0.3]", "equivariance_jitter", (0.0, 0.1, 0.2, 0.3)),
    ("equivariance_augmentation: {crop: shared, flip: 0}", "equivariance_crop", "shared"),
    ("equivariance-augmentation: {jitter-p: 1}\nequivariance_jitter_p: 1", "equivariance_jitter_p", 1.0),
    ("equivariance_augmentation: {greyscale: 0.1}", "equivariance_grayscale", 0.1),
]
WRONG = [
    *("train_simclr: nope", "train_simclr: 2", "compile: null", "resume: [true]"),
    *("epochs: .nan", "epochs: 2.5", "epochs: many", "epochs: true", "epochs: null", "epochs: .inf"),
    *(
        "seed: abc",
        "seed: 1e400",
        "seed: 99999999999999999999",
        "max_steps: 2024-01-05",
        "queue_size: {a: 1}",
    ),
    *("lr: .inf", "lr: -.inf", "lr: fast", "lr: yes", "lr: [0.1]", "lr: null", "temperature: .NaN"),
    *("jitter: [0.1]", "jitter: 0.1", "jitter: '1234'", "jitter: [0.1, 0.1, 0.1, .nan]", "jitter: null"),
    *("dataset_name: [x]", "dataset_name: null", "run_name: 2024-01-05", "save_root: 7", "data_root: false"),
    *("optimizer: [sgd]", "optimizer: yes", "method: 3", "mixed_precision: on"),
]


@pytest.mark.parametrize(("text", "name", "value"), USUAL)
def test_usual_spellings_are_read(text, name, value, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    read = getattr(TrainConfig(**read_yaml(tmp_path / "c.yaml")), name)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("text", WRONG)
def test_values_of_another_type_are_refused_by_the_name_of_their_option(text):
    with pytest.raises(CareHubError) as refused:
        TrainConfig(**yaml.safe_load(text))
    assert str(refused.value).startswith(f"`{text.partition(':')[0]}` ") and "\n" not in str(refused.value)


@pytest.mark.parametrize("config", [DataConfig, TrainConfig, EvalConfig])
def test_every_option_has_a_type_that_is_checked(config):
    for option in dataclasses.fields(config):
        for wrong in ([[]], {"a": 1}, math.inf, object()):
            with pytest.raises(CareHubError, match=f"`{option.name}` "):
                typed_options(config, {option.name: wrong})


def test_python_callers_may_give_paths_and_numbers_of_numpy():
    config = TrainConfig(save_root=Path("a/b"), lr=np.float32(0.5), epochs=np.int64(3))
    assert (config.save_root, config.lr, config.epochs) == ("a/b", 0.5, 3)
    assert [type(v) for v in (config.save_root, config.lr, config.epochs)] == [str, float, int]
    with pytest.raises(CareHubError, match="`num_workers` must be a whole number, got 'two'"):
        DataConfig("shapes", num_workers="two")
    assert EvalConfig("shapes", encoder="here", protocol="SGD", lr="1e-3").lr == 0.001


def test_settings_of_accelerate_are_taken_over_where_none_are_given():
    launched = {"gradient_accumulation": 4, "mixed_precision": "bf16", "compile": True}
    taken = TrainConfig().take_over(launched)
    assert {name: getattr(taken, name) for name in launched} == launched
    assert taken.taken_over == launched.keys() and TrainConfig().take_over({}) == TrainConfig()
    assert TrainConfig().gradient_accumulation == 1
    same = TrainConfig(gradient_accumulation=4, mixed_precision="bf16").take_over(launched)
    assert same.taken_over == {"compile"} and same == taken
    for name, given in (("gradient_accumulation", 1), ("mixed_precision", "no")):
        with pytest.raises(CareHubError, match=f"`{name}={given!r}` and Accelerate's .* differ; give one"):
            TrainConfig(**{name: given}).take_over(launched)


def test_the_encoder_to_begin_with_fixes_the_architecture_and_is_published_by_its_name():
    initial = EncoderConfig("resnet18_cifar", 40, 1.0, (0.5,) * 3, (0.5,) * 3)
    config = (
        TrainConfig(init="/home/ann/birds/export").take_over({"gradient_accumulation": 2}).start_from(initial)
    )
    assert (config.model, config.image_size) == ("resnet18_cifar", 40) and config.taken_over
    assert config.published()["init"] == "birds" and "/home/ann/birds/export" in to_yaml(config)
    assert TrainConfig(init="x.y", model="resnet18_cifar", image_size=16).start_from(initial).image_size == 16
    with pytest.raises(CareHubError, match=r"not the architecture of 'x.y', which is resnet18_cifar; leave"):
        TrainConfig(init="x.y", model="resnet18").start_from(initial)
    assert TrainConfig(init="").init is None and TrainConfig().model == "resnet10_w16_small"


def test_options_of_an_evaluation_are_checked_too():
    def refused(match, **options):
        with pytest.raises(CareHubError, match=match):
            EvalConfig(**({"dataset_name": "shapes", "encoder": "here"} | options))

    refused("`encoder` is missing", encoder="")
    refused("`dataset_name` is missing", dataset_name="")
    refused("`label_fraction` must lie in", label_fraction=2.0)
    refused("`augmented_copies` belongs to", augmented_copies=2)
    refused("`lr` must be positive", lr=0)
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
    own = {"equivariance_jitter": [0.1, 0.2, 0.3, 0.4], "equivariance_crop": "shared", "flip": 0}
    config = TrainConfig(jitter=[0.1, 0.2, 0.3, 0.4], grayscale=0.3, blur_kernel_size=5, **own)
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
        ("run_name: 2024-13-45", "not valid YAML"),
        ("jitter: &a [1, 1]\nlr: [*a, *a]", "nested values for 'lr'"),
        ("equivariance_augmentation: {hues: 1}", "unknown option 'equivariance_hues'"),
        ("equivariance_augmentation: false", "must have a mapping as 'equivariance_augmentation'"),
        ("equivariance_augmentation: {jitter: {p: 1}}", "nested values for 'equivariance_jitter'"),
        ("equivariance_augmentation: {blur: 1}\nequivariance_blur: 0", "two values for 'equivariance_blur'"),
        ("moco_t: 0.2", "unknown option 'moco_t'; give `temperature`"),
        ("equiv-splits-per-gpu: 4", "give `equiv_splits`, which counts"),
    ]:
        file.write_text(text)
        with pytest.raises(CareHubError, match=sentence):
            read_yaml(file)
    for bytes_ in ("dataset_name: caf\xe9".encode("latin-1"), "epochs: 3".encode("utf-16")):
        file.write_bytes(bytes_)
        with pytest.raises(CareHubError, match=r"c[.]yaml' is not UTF-8 text"):
            read_yaml(file)
    with pytest.raises(CareHubError, match="can't be read"):
        read_yaml(tmp_path / "absent.yaml")


def test_options_of_the_public_code_lead_to_options_that_exist():
    known = {option.name for option in dataclasses.fields(TrainConfig)}
    assert not PUBLIC_CODE.keys() & known
    for instead in PUBLIC_CODE.values():
        assert instead.startswith("nothing: ") or instead.split("`")[1].partition("=")[0] in known


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


def test_results_are_kept_under_the_name_of_a_folder_or_a_label(tmp_path, monkeypatch):
    def label(**options) -> str:
        return DataConfig(**({"dataset_name": "imagefolder"} | options)).data_label

    monkeypatch.chdir(tmp_path)
    assert label(data_root="/data/birds") == label(data_root="/data/birds/") == "birds"
    assert label(data_root=".") == tmp_path.name
    assert label(data_root="/") == label() == "imagefolder"
    assert label(data_root="a\nb") == "a\\nb" and label(data_root="x" * 200) == "x" * 64
    assert label(dataset_name="cifar10", data_root="/data/copy") == "cifar10"
    assert label(dataset_name="org/pets", data_root="/data/copy") == "org/pets"
    assert label(data_root="/data/birds", dataset_label="my birds") == "my birds"
    for wrong in ("", "x" * 65):
        with pytest.raises(CareHubError, match="`dataset_label` must have 1 to 64 letters"):
            label(dataset_label=wrong)

"""Wrong invocations of train.py, eval_linear.py and care-hub: one sentence each, and a status of failure.

One table: every option with values of the wrong type and out of range, as flags and in YAML; every argument
that names a file, with all that may lie there; and what contradicts itself.
"""

import dataclasses
import json
import shutil
import typing

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file

from care_hub import cli
from care_hub.config import EvalConfig, TrainConfig, kinds_of
from care_hub.hub import client
from care_hub.hub.registry import SHIPPED

ENCODER = "resnet10_w16_small.care_shapes"
DATA = ("--dataset-name", "imagefolder", "--data-root", "{photos}")
TRAIN = ("train", "--dry-run", *DATA, "--image-size", "16", "--batch-size", "8", "--equiv-splits", "2")
EVAL = ("eval_linear", "--encoder", ENCODER, *DATA)
KNN, TURNS = ("knn", ENCODER, *DATA), ("equivariance", ENCODER, *DATA)
ROTATE = ("rotations", "{encoder}", "--images", "{photos}")
SEARCH = ("--query", "{photos}/test/cold/00.png")
EMBED, CLASSIFY = ("embed", "{photos}", "--encoder", ENCODER), ("classify", "{photos}", "--encoder", ENCODER)

NOT_A = {
    int: ("abc", "1.5", "nan", "inf", "1e30", "9" * 400, ""),
    float: ("abc", "nan", "inf", "-inf", "1e400", ""),
}
# Numbers of the right type that can't be.
OUT_OF_RANGE = {
    "num_workers": "-1 -3",
    "image_size": "0 -1 100000",
    "projection_hidden": "0 -1",
    "projection_dim": "0 -1",
    "weight": "-1",
    "weight_start_epochs": "-1 20",
    "weight_warmup_epochs": "-1",
    "equiv_splits": "0 -2 3 8",
    "equivariant_batch_size": "0 -8 3 16",
    "queue_size": "0 -8 3",
    "momentum_encoder": "-0.1 1.1",
    "temperature": "0 -1",
    "crop_scale": "0 -1 1.5",
    "jitter_p": "-0.1 2",
    "grayscale": "-0.1 2",
    "blur": "-0.1 2",
    "flip": "-0.1 2",
    "equivariance_crop_scale": "0 -1 1.5",
    **dict.fromkeys((f"equivariance_{k}" for k in ("jitter_p", "grayscale", "blur", "flip")), "-0.1 2"),
    "blur_kernel_size": "0 -3 2 33",
    "epochs": "0 -1",
    "batch_size": "0 -8",
    "gradient_accumulation": "0 -1",
    "lr": "-1",
    "weight_decay": "-1",
    "momentum": "-1 1.5",
    "warmup_epochs": "-1",
    "seed": "-1",
    "max_steps": "0 -1",
    "knn_every": "-1",
    "knn_bank": "0 -1",
    "checkpoint_every": "0 -1",
    "log_freq": "0 -1",
    "augmented_copies": "-1",
    "label_fraction": "0 -1 1.5",
    "seeds": "0 -1",
}
TEXTS = {
    "model": ("resnet19", "", "x" * 5000),
    "dataset_name": ("cifar11", "", "x" * 5000),
    "data_root": ("{absent}", "{empty}", "{file}", "{long}"),
    "dataset_label": ("x" * 100,),
    "label_column": ("absent",),
    "run_name": ("..", "../up", "/", "a/../b", ""),
    "push_to_hub": ("a b", "no-slash", "a/b/c"),
    "encoder": ("{absent}", "{empty}", "{file}", "{long}", "{photos}", "{damaged}"),
    "output_dir": ("{file}", "{long}", "{file}/below"),
}
EVERYTHING = (
    *("{absent}", "{long}", "{empty}", "{file}", "{binary}", "{pickle}", "{timm}", "{transformers}"),
    *("{adapter}", "{pickled}", "{damaged}", "{cut}", "{nested}", "{huge}", "{no_weights}"),
)


def wrong_options(config, base):
    """Each option of `config` with values that it can't have."""
    hints = typing.get_type_hints(config)
    for option in dataclasses.fields(config):
        kinds = kinds_of(hints[option.name])
        flag = cli.flag(option.name)
        if option.metadata["choices"]:
            yield from ((*base, flag, value) for value in ("bogus", ""))
        elif len(kinds) > 1:
            yield (*base, flag, *["abc"] * len(kinds))
            yield (*base, flag, *["-1"] * len(kinds))
        elif kinds[0] is bool:
            yield (*base, f"{flag}=maybe")
        values = [*NOT_A.get(kinds[0], ()), *OUT_OF_RANGE.get(option.name, "").split()]
        values += TEXTS.get(option.name, ())
        yield from ((*base, flag, value) for value in values if len(kinds) == 1)


def wrong_files():
    """Each argument that names a file or a folder, with all that may lie there."""
    takes = {
        ("train", "--dry-run", "--config"): {"{empty}", "{file}"},  # an empty file sets no option
        ("info",): set(),
        ("knn", "", *DATA): set(),
        ("equivariance", "", *DATA): set(),
        ("rotations", "", "--images", "{photos}"): set(),
        ("rotations", "{encoder}", "--images"): set(),
        ("rotations", "{encoder}", "--pairs", "camera", "{photos}"): set(),
        ("embed", "{photos}", "-o", "{out}.npy", "--encoder"): set(),
        ("classify", "{photos}", "--encoder"): set(),
        ("report", "-o", "{out}.html"): set(),
        ("demo", "", "--images", "{photos}", "-o", "{out}.html"): set(),
        ("demo", "{encoder}", "-o", "{out}.html", "--images"): set(),
        ("push", "", "org/name"): set(),
        ("embed", "--encoder", ENCODER, "-o", "{out}.npy"): set(),
        ("classify", "--encoder", ENCODER): set(),
        ("convert", "", "{out}"): set(),
    }
    for words, fine in takes.items():
        for value in EVERYTHING:
            if value not in fine:
                yield tuple(value if word == "" else word for word in words) + (
                    () if "" in words else (value,)
                )


OTHERS = [
    ("train", "--dry-run", "--dataset-name", "imagefolder"),
    ("train", "--resume"),
    ("train", "--resume", "--run-name", "absent"),
    (*TRAIN, "--weight", "0", "--loss-subtype", "none"),
    (*TRAIN, "--method", "moco", "--loss-subtype", "alignment"),
    (*TRAIN, "--mixed-precision", "fp16"),
    (*TRAIN, "--blur", "0", "--equivariance-blur", "1", "--blur-kernel-size", "33"),
    (*TRAIN, "--model", "vit_tiny_patch16_224", "--image-size", "40"),
    (*TRAIN, "--no-such-option"),
    (*TRAIN, "unexpected"),
    ("eval_linear",),
    ("eval_linear", "--encoder", ENCODER),
    (*EVAL, "--protocol", "finetune"),
    (*EVAL, "--augmented-copies", "2"),
    (*KNN, "--k", "0"),
    (*KNN, "--k", "1.5"),
    (*KNN, "--temperature", "0"),
    (*KNN, "--temperature", "nan"),
    (*KNN, "--temperature", "inf"),
    (*KNN, "--bank", "0"),
    (*TURNS, "--images", "3"),
    (*TURNS, "--draws", "0"),
    (*TURNS, "--seed", "-1"),
    (*TURNS, "--seed", "9" * 40),
    (*TURNS, "--seed", "x"),
    (*TURNS, "-o", "{file}"),
    (*TURNS, "-o", "{long}"),
    ("equivariance", *DATA),
    *(("search", words, *SEARCH) for words in ("{absent}", "{empty}", "{file}", "{binary}", "{photos}")),
    ("search", *SEARCH),
    ("search", "{photos}"),
    ("search", "{photos}", *SEARCH, "-k", "0"),
    ("rotations", "{encoder}"),
    ("rotations", "{encoder}", "--transform", "hue"),
    ("rotations", ENCODER, "--images", "{photos}"),
    (*ROTATE, "--dataset-name", "shapes"),
    *(
        (*ROTATE, "--transform", text)
        for text in ("", "hues", "hue=", "hue=9", "hue=0", "flip=0.5", "hue=1+")
    ),
    (*ROTATE, "--transform", "hue", "--transform", "hue"),
    (*ROTATE, "--pairs", "camera", "{photos}"),
    (*ROTATE, "--limit", "3"),
    (*ROTATE, "--seed", "-1"),
    (*ROTATE, "--output-dir", "{file}"),
    ("demo", ENCODER),
    ("demo", ENCODER, "--images", "{photos}", "-o", "{absent}/page.html"),
    ("demo", ENCODER, "--images", "{photos}", "--limit", "1"),
    EMBED,
    *(
        (*EMBED, "-o", out)
        for out in ("{out}.csv", "{absent}/z.npy", "{long}.npy", "{photos}", "{file}/z.npy")
    ),
    (*EMBED, "-o", "{out}.npy", "--space", "x"),
    (*EMBED, "-o", "{out}.npy", "--batch-size", "0"),
    ("embed", "{broken}", "--encoder", ENCODER, "-o", "{out}.npy"),
    ("embed", "{broken}", "--encoder", ENCODER, "-o", "{out}.npy", "--skip-broken-images"),
    (*CLASSIFY, "--dataset", "absent"),
    (*CLASSIFY, "--batch-size", "-1"),
    ("classify", "{broken}", "--encoder", ENCODER),
    ("convert", "{absent}"),
    ("report",),
    ("report", "{run}", "-o", "{photos}"),
    ("report", "{run}", "-o", "{absent}/page.html"),
    *(("report", run) for run in ("{bad_metrics}", "{bad_results}", "{bad_config}")),
    *(("info", name) for name in ("", "a/b/c", "../up", "resnet10_w16_small.care_shape", "a b/c", "-")),
    ("push", "{encoder}", "not a name"),
    ("push", "{encoder}"),
    ("nonsense",),
    ("--nonsense",),
]
YAML = [
    *({option.name: value} for option in dataclasses.fields(TrainConfig) for value in ([[1]], {"a": 1})),
    *({name: "maybe"} for name in ("train_simclr", "resume", "compile", "projection_norm")),
    *({name: True} for name in ("epochs", "lr", "seed", "jitter")),
    *({"jitter": value} for value in ([0.1], [0.1] * 5, "0.1", [0.1, 0.1, 0.1, None], 0.1)),
    *({"unknown": 1}, {"Epochs": 1}, {1: 2}, {None: 1}, [1, 2], "text", 7),
]
CASES = [*wrong_options(TrainConfig, TRAIN), *wrong_options(EvalConfig, EVAL), *wrong_files(), *OTHERS]


@pytest.fixture(scope="module")
def places(photos, tmp_path_factory):
    """What the names in braces stand for."""
    root = tmp_path_factory.mktemp("bad input")
    names = {"photos": photos, "absent": root / "absent", "long": root / ("n" * 5000)}

    def folder(name, **files):
        names[name] = root / name
        names[name].mkdir()
        for file, content in files.items():
            path = names[name] / file.replace("__", ".")
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    folder("empty")
    for name, content in {"file": b"", "binary": bytes(range(256)) * 9}.items():
        names[name] = root / name
        names[name].write_bytes(content)
    names["pickle"] = root / "pickle.pth.tar"
    torch.save({"state_dict": {"other.weight": torch.zeros(2)}}, names["pickle"])
    folder("timm", config__json='{"architecture": "resnet18", "num_classes": 0, "pretrained_cfg": {}}')
    save_file({"conv1.weight": torch.zeros(2)}, names["timm"] / "model.safetensors")
    folder("transformers", config__json='{"architectures": ["ViTModel"], "model_type": "vit"}')
    folder("adapter", adapter_config__json='{"peft_type": "LORA", "r": 8}')
    save_file({"lora": torch.zeros(2)}, names["adapter"] / "adapter_model.safetensors")
    whole = {path.name: path.read_bytes() for path in (SHIPPED / ENCODER).iterdir() if path.is_file()}

    def export(name, **changed):
        names[name] = root / name
        shutil.copytree(SHIPPED / ENCODER, names[name], ignore=shutil.ignore_patterns("*.png"))
        for file, content in changed.items():
            path = names[name] / file.replace("__", ".")
            path.unlink() if content is None else path.write_bytes(content)

    config = json.loads(whole["config.json"])
    export("encoder")
    export("pickled", model__safetensors=None)
    shutil.copy(names["pickle"], names["pickled"] / "pytorch_model.bin")
    export("no_weights", model__safetensors=None)
    export("damaged", config__json=whole["config.json"][:-100])
    export("cut", model__safetensors=whole["model.safetensors"][:-100])
    export("nested", config__json=b'{"care": ' + b"[" * 100_000)
    export(
        "huge", config__json=json.dumps(config | {"care": config["care"] | {"image_size": 10**400}}).encode()
    )
    run = {
        "config.yaml": "dataset_name: shapes\n",
        "metrics.jsonl": '{"step": 1, "loss": 1.0}\n',
        "results.json": "{}",
    }
    for name, file, content in (
        ("run", "config.yaml", run["config.yaml"]),
        ("bad_metrics", "metrics.jsonl", '{"step": \n{"step": 2}\n'),
        ("bad_results", "results.json", "[1"),
        ("bad_config", "config.yaml", "lr: [1"),
    ):
        folder(name, **{key.replace(".", "__"): value for key, value in (run | {file: content}).items()})
    folder("broken", a__png="no image", b__jpg="none either")
    return names


@pytest.fixture
def refusal(places, tmp_path, monkeypatch):
    """Runs a command, where no Hub can be reached; gives its exit status and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(client, "RETRY_SECONDS", ())
    commands = {"train": cli.train, "eval_linear": cli.eval_linear}

    def run(words):
        words = [word.format(**places, out=tmp_path / "out") if "{" in word else word for word in words]
        function, words = (commands[words[0]], words[1:]) if words[0] in commands else (cli.main, words)
        done = CliRunner().invoke(function, words)
        return done, done.output

    return run


def name_of(words):
    return " ".join(word if len(word) < 50 else f"{word[:9]}..." for word in words if word not in DATA)


def check(done, output):
    assert done.exit_code not in (0, None), output
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    errors = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and "Traceback" not in output and len(errors[0]) > 15, output


@pytest.mark.parametrize("words", CASES, ids=name_of)
def test_a_wrong_invocation_ends_in_one_sentence(words, refusal):
    check(*refusal(words))


@pytest.mark.parametrize("values", YAML, ids=lambda values: str(values)[:60])
def test_a_wrong_file_of_options_ends_in_one_sentence(values, refusal, tmp_path):
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(values))
    check(*refusal(("train", "--config", str(tmp_path / "options.yaml"))))

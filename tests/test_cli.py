"""The command line: options by group, flags before files before defaults, errors that speak flags."""

import os

import click
import datasets
import pytest
from helpers import care_hub_command, command, run
from PIL import Image

from care_hub import cli
from care_hub.config import RECIPES, EvalConfig, TrainConfig, read_yaml, to_yaml
from care_hub.cores import cores
from care_hub.errors import CareHubError
from care_hub.training import trainer


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 3\nbatch-size: 64\njitter: [0.1, 0.2, 0.3, 0.4]\n")
    config = cli.resolve({"epochs": 7}, str(file))
    assert (config.epochs, config.batch_size, config.jitter) == (7, 64, (0.1, 0.2, 0.3, 0.4))
    assert config.lr == TrainConfig.lr


def test_the_crop_of_the_equivariance_views_is_a_flag_or_a_word(monkeypatch):
    configs: list[TrainConfig] = []
    monkeypatch.setattr(trainer, "train", configs.append)
    for word in ("--equivariance-crop", "--no-equivariance-crop", "--equivariance-crop=shared"):
        command(cli.train, word, "--equivariance-jitter", 0, 0, 0, 1)
    assert [config.equivariance_crop for config in configs] == [True, False, "shared"]
    assert {config.equivariance_jitter for config in configs} == {(0, 0, 0, 1)}


def test_recipes_are_found_by_name_and_as_files_that_used_to_lie_beside_train_py(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = cli.resolve({}, str(RECIPES / "cifar10_small.yaml"))
    for name in ("cifar10_small", "cifar10_small.yaml", "recipes/cifar10_small.yaml"):
        assert cli.resolve({}, name) == expected
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "cifar10_small.yaml").write_text("lr: 0.7")  # a file of one's own
    assert cli.resolve({}, "recipes/cifar10_small.yaml").lr == 0.7
    for wrong in ("cifar10_smal", "elsewhere/shapes.yaml"):
        assert f"configuration '{wrong}' can't be read" in command(cli.train, "--config", wrong, ok=False)
    assert "did you mean 'cifar10_small'?" in command(cli.train, "--config", "cifar10_smal", ok=False)


def test_recipes_are_listed_with_a_line_each():
    *rows, empty, place = care_hub_command("recipes").splitlines()
    assert [row.split()[0] for row in rows] == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert all(len(row.split()) > 4 for row in rows) and not empty and place == f"in {RECIPES}"


def test_train_and_probe_are_commands_of_care_hub(monkeypatch):
    configs: list[TrainConfig | EvalConfig] = []
    monkeypatch.setattr(trainer, "train", configs.append)
    monkeypatch.setattr("care_hub.evaluate.commands.evaluate", configs.append)
    care_hub_command("train", "--config", "stl10", "--lr", "0.5")
    care_hub_command("probe", "--encoder", "x", "--dataset-name", "shapes")
    train, probe = configs
    assert (train.dataset_name, train.lr) == ("stl10", 0.5) and probe.encoder == "x"
    assert "for --cos give --lr-schedule-type cosine" in care_hub_command("train", "--cos", ok=False)


def test_values_of_the_wrong_kind_are_refused_alike_in_files_and_as_flags(tmp_path):
    file = tmp_path / "mine.yaml"
    for name, value in [("epochs", "many"), ("lr", "inf"), ("seed", "1.5"), ("optimizer", "adma")]:
        file.write_text(f"{name}: '{value}'")
        said = [
            command(cli.train, "--config", file, ok=False),
            command(cli.train, f"--{name}", value, ok=False),
        ]
        assert said[0] == said[1] and f"Error: --{name} " in said[0] and f"'{value}'" in said[0]
    data = ("--dataset-name", "shapes", "--num-workers", "two")
    for words in [("knn", "x", *data), ("equivariance", "x", *data)]:
        assert "--num-workers must be a whole number" in care_hub_command(*words, ok=False)
    refused = command(cli.eval_linear, "--encoder", "x", *data[:2], "--label-fraction", "nan", ok=False)
    assert "--label-fraction must be a finite number" in refused


def test_choices_are_found_in_any_case(monkeypatch):
    monkeypatch.setattr(cli, "_print_json", lambda result: None)
    monkeypatch.setattr("care_hub.evaluate.commands.evaluate", lambda config: found.append(config))
    found: list[EvalConfig] = []
    command(cli.eval_linear, "--encoder", "x", "--dataset-name", "shapes", "--optimizer", "SGD")
    assert found[0].optimizer == "sgd"
    assert cli.resolve({"optimizer": "SGD", "mixed_precision": "No"}, None).optimizer == "sgd"


def test_a_resumed_run_compares_values_as_they_are_meant(tmp_path):
    (tmp_path / "r").mkdir()
    before = to_yaml(TrainConfig(lr=0.001, optimizer="adam"))
    older = before.replace("\nflip: 0.5\n", "\n")  # of a version that did not have the option
    (tmp_path / "r" / "config.yaml").write_text(older)
    place = {"save_root": tmp_path, "run_name": "r", "resume": "yes"}
    same = {"lr": "1e-3", "optimizer": "Adam", "jitter": ["0.3", 0.3, 0.3, 0.5], "flip": "0.5"}
    assert older != before and cli.resolve(place | same, None).optimizer == "adam"
    with pytest.raises(CareHubError, match=r"`lr` was 0[.]001 in this run and can't become 0[.]002"):
        cli.resolve(place | {"lr": "2e-3"}, None)


COMMON = "--model resnet50 --temperature 0.5 --epochs 400 --batch-size 256 --log-freq 1"
COMMON += " --project project_name --user sample_user --run-name test"
SGD = "--optimizer SGD --lr 0.06 --weight-decay 5e-4 --lr-schedule-type cosine --warmup-epochs 10"
PLAIN = "--weight 0.03 --equiv-splits 16 --optimizer Adam --train-simclr"
PUBLISHED = [  # the public code's scripts, but for paths; what they change of a recipe; words of the plan
    (
        "cifar10",
        "--weight 0.03 --equiv-splits 16",
        {},
        "weight 0.03 after 320 epochs growing over 20 epochs, 16 groups",
    ),
    (
        "cifar100",
        "--weight 0.001 --equiv-splits 4",
        {},
        "weight 0.001 after 320 epochs growing over 20 epochs, 4 groups",
    ),
    (
        "stl10",
        f"--weight 0.01 --equiv-splits 8 {SGD}",
        {},
        "weight 0.01 after 320 epochs growing over 20 epochs, 8 groups",
    ),
    ("cifar10", PLAIN, {"weight": 0.0, "train_simclr": True}, "simclr"),
]
HUB_LAYOUTS: dict[str, tuple[str, dict[str, int], dict[str, int]]] = {  # image, labels, images per split
    "cifar10": ("img", {"label": 10}, {"train": 512, "test": 4}),
    "cifar100": ("img", {"fine_label": 100, "coarse_label": 20}, {"train": 512, "test": 4}),
    "stl10": ("image", {"label": 10}, {"train": 100, "test": 4, "unlabeled": 412}),
}


@pytest.mark.parametrize(("name", "flags", "_", "method"), PUBLISHED)
def test_published_command_lines_are_planned_as_they_say(name, flags, _, method, tmp_path):
    image, labels, splits = HUB_LAYOUTS[name]
    features = {column: datasets.ClassLabel(num_classes=count) for column, count in labels.items()}
    for split, count in splits.items():
        columns = dict.fromkeys(labels, [0] * count) | {image: [Image.new("RGB", (32, 32))] * count}
        rows = datasets.Dataset.from_dict(columns, datasets.Features({image: datasets.Image()} | features))
        rows.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    words = f"--dataset-name {name} {COMMON} {flags} --dry-run".split()
    plan = command(cli.train, *words, "--data-root", tmp_path, "--save-root", tmp_path / "runs")
    expected = [f"{method} · resnet50 (", f"{name}, 512 images at 32 px", "800 steps of 256 images (400.0 "]
    if "SGD" in flags:
        expected += ["fused sgd", "0.06 at step 21"]  # after ten epochs of two steps
    if "Adam" in flags:
        expected += ["fused adam"]
    assert all(part in plan for part in expected), plan
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("name", "flags", "changes", "_"), PUBLISHED)
def test_published_command_lines_agree_with_the_recipes(name, flags, changes, _, monkeypatch):
    """The recipes say what the public code has as defaults, its stem for small images too."""
    configs: list[TrainConfig] = []
    monkeypatch.setattr(trainer, "train", configs.append)
    words = f"--dataset-name {name} {COMMON} {flags} --model resnet50_cifar".split()
    command(cli.train, "--config", name, *words)
    (config,) = configs
    assert config.published() == TrainConfig(**read_yaml(name)).published() | changes
    assert (config.log_freq, config.project, config.user) == (1, "project_name", "sample_user")


def test_options_of_the_public_code_for_imagenet_are_explained_each():
    words = (
        "-a resnet50 --lr 0.4 --batch-size 256 --dist-url env:// --moco-t 0.2 --moco-m 0.99 --moco-k=65536 "
    )
    words += (
        "--epochs 200 --cos --log-root x --data y --run-name z --method simclr --split-batch --weight 0.005 "
    )
    words += "--equiv-splits-per-gpu 4 --save-only-last-checkpoint --project p --user u --local-rank=0"
    said = command(cli.train, *words.split(), ok=False)
    for name, new in {
        "-a": "--model",
        "--moco-t": "--temperature",
        "--moco-m": "--momentum-encoder",
        "--moco-k": "--queue-size",
        "--cos": "--lr-schedule-type cosine",
        "--log-root": "--save-root",
        "--data": "--data-root",
        "--split-batch": "--batch-size",
        "--equiv-splits-per-gpu": "--equiv-splits",
        "--save-only-last-checkpoint": "--checkpoint-every",
        "--dist-url": "nothing",
        "--local-rank": "nothing",  # which torch.distributed.launch adds
    }.items():
        assert f"for {name} give {new}" in said
    assert "No such option" in command(cli.train, "--mocha", ok=False)


def test_help_shows_options_under_their_groups_and_whole_summaries():
    shown = command(cli.train, "--help")
    headings = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Options:", "Data:", "Model:", "Method:", "Augmentation:", "Optimization:", "Run:"]
    assert (
        shown.index("Method:")
        < shown.index("--weight ")
        < shown.index("Augmentation:")
        < shown.index("--grayscale")
    )
    assert "greyscale" not in shown
    assert "..." not in care_hub_command("--help").replace("[ARGS]...", "")


def test_former_flags_are_understood(tmp_path):
    same = [command(cli.train, name, "0.7", "--dry-run") for name in ("--grayscale", "--greyscale")]
    assert same[0] == same[1]
    assert "No such option" in command(cli.eval_linear, "--blur-colour=3", ok=False)
    assert "--blur-kernel-size must be odd, got 4" in command(cli.train, "--blur-taps=4", ok=False)


def test_errors_name_flags_where_the_library_names_options():
    @click.command(cls=cli.Command)
    @click.option("--run-name")
    @click.option("--resume", is_flag=True)
    def fails(**options):
        raise CareHubError("`resume=True` with `run_name='a b'`, `run_name` or `batch_size=3` in `care_hub`.")

    expected = "--resume with --run-name 'a b', --run-name or `batch_size=3` in `care_hub`."
    assert expected in command(fails, ok=False)


@pytest.mark.launches
def test_import_and_help_are_light():
    code = "import sys, care_hub, care_hub.cli; assert not {'torch', 'timm', 'datasets'} & set(sys.modules)"
    run("python", "-c", code)
    for words in (["--help"], ["embed", "--help"]):
        assert "Usage" in run("python", "-c", "from care_hub.cli import main; main()", *words).stdout


def test_all_cores_are_used_unless_a_person_asked_for_one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for given, launched, expected in [
        (None, {}, str(cores())),
        ("1", {}, "1"),
        ("1", {"LOCAL_WORLD_SIZE": "1"}, str(cores())),  # which torchrun asked for
        ("3", {"LOCAL_WORLD_SIZE": "1"}, "3"),
        ("4,2", {"LOCAL_WORLD_SIZE": "1"}, "4,2"),
        ("1", {"ACCELERATE_MIXED_PRECISION": "bf16"}, "1"),
    ]:
        for name, value in {"LOCAL_WORLD_SIZE": None, "OMP_NUM_THREADS": given, **launched}.items():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        cli.use_all_cores()
        assert os.environ["OMP_NUM_THREADS"] == expected


@pytest.mark.launches
def test_a_launcher_passes_on_the_one_thread_that_a_user_asked_for(tmp_path):
    ask = "import os; from care_hub import cli; cli.use_all_cores(); print(os.environ['OMP_NUM_THREADS'])"
    launcher = tmp_path / "torchrun"  # which asks for one thread if nobody else does
    launcher.write_text(
        "import os, subprocess, sys\n"
        "os.environ.setdefault('OMP_NUM_THREADS', '1')\n"
        "os.environ['LOCAL_WORLD_SIZE'] = '1'\n"
        f"subprocess.run([sys.executable, '-c', {ask!r}], check=True)\n"
    )

    def threads(*words, **environment):
        variables = (f"{name}={value}" for name, value in environment.items())
        done = run("env", "-u", "OMP_NUM_THREADS", *variables, "python", launcher, *words)
        return done.stdout.strip()

    assert threads() == str(cores())
    assert threads(OMP_NUM_THREADS="1") == threads("--num-cpu-threads-per-process=1") == "1"
    assert threads(OMP_NUM_THREADS="3") == "3"

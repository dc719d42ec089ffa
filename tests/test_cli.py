"""The command line: options by group, flags before files before defaults, errors that speak flags."""

import click
import pytest
from helpers import care_hub_command, command, run

from care_hub import cli
from care_hub.config import TrainConfig
from care_hub.errors import CareHubError


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 3\nbatch-size: 64\njitter: [0.1, 0.2, 0.3, 0.4]\n")
    config = cli.resolve({"epochs": 7}, str(file))
    assert (config.epochs, config.batch_size, config.jitter) == (7, 64, (0.1, 0.2, 0.3, 0.4))
    assert config.lr == TrainConfig.lr


def test_values_of_the_wrong_kind_are_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    for text in ("epochs: many", "jitter: [0.1]"):
        file.write_text(text)
        with pytest.raises(CareHubError, match="wrong kind"):
            cli.resolve({}, str(file))


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

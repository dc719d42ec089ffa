"""evaluation.json: what was measured is neither lost nor believed of other weights."""

import json

import pytest
import torch
from click.testing import CliRunner
from helpers import measured, stored, visible
from processes import FORKS, start, status

from care_hub import cli
from care_hub.hub.card import write_card
from care_hub.hub.client import fetch
from care_hub.hub.evaluation_record import add_result, read_record
from care_hub.hub.linear_head import LinearHead, head_file_name, read_heads
from care_hub.hub.push import push_folder


def test_results_of_one_data_set_are_kept_side_by_side(export):
    add_result(export, "accuracy", "shapes", {"kNN": {"top1": 50.0}})
    add_result(export, "accuracy", "shapes", {"linear probe": {"top1": 61.5}})
    add_result(export, "accuracy", "shapes", {"kNN": {"top1": 51.0}})
    add_result(export, "equivariance", "shapes", measured(label=14.5))
    record = read_record(export)
    assert record["accuracy"] == {"shapes": {"kNN": {"top1": 51.0}, "linear probe": {"top1": 61.5}}}
    assert record["equivariance"] == {"shapes": measured(label=14.5)}


def test_evaluations_travel_with_the_encoder(server, export):
    add_result(
        export, "accuracy", "shapes", {"linear probe, 1 % of the labels": {"top1": 12.5, "n_train": 50}}
    )
    push_folder(export, "lab/tiny")
    assert read_record(fetch("lab/tiny")) == read_record(export) != {}
    told = json.loads(CliRunner().invoke(cli.main, ["info", "lab/tiny"]).stdout)
    assert told["accuracy"]["shapes"]["linear probe, 1 % of the labels"]["top1"] == 12.5
    assert "12.50" in stored(server, "lab/tiny")["README.md"].decode()


STRANGE = [
    [],
    {"accuracy": {"a": {"b": {"top1": "<b>"}}}},
    {"accuracy": {"a": {"b": {}}}},
    {"accuracy": {"a": {"b": {"top1": 1, "seeds": "<b>"}}}},
    {"equivariance": {"a": {"kept": 1}}},
    {"equivariance": {"a": measured(label=1) | {"images": "<b>"}}},
    {"equivariance": {"a": measured(label=1) | {"families": {"crop": {"gamma": [1, 2]}}}}},
    {"equivariance": {"a": measured(label=1) | {"families": {"crop": {"gamma": [1, 2, "<b>"]}}}}},
    {"equivariance": {"a": measured(label=1) | {"attributes": {"backbone": {"label": None}}}}},
    {
        "equivariance": {
            "a": measured(label=1) | {"attributes": {"backbone": {"x": 1}, "projection": {"y": 1}}}
        }
    },
    {"equivariance": {"a": measured(label=1) | {"attributes": {}}}},
]


@pytest.mark.parametrize("results", STRANGE)
def test_a_record_of_a_stranger_is_not_believed(results, export):
    add_result(export, "accuracy", "shapes", {"kNN": {"top1": 50.0}})
    path = export / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"results": results}))
    assert read_record(export) == {}
    write_card(export)


def test_a_record_of_other_weights_or_cut_short_is_not_believed(export):
    add_result(export, "accuracy", "shapes", {"kNN": {"top1": 50.0}})
    path = export / "evaluation.json"
    text = path.read_text()
    for other in (text.replace('"encoder": "', '"encoder": "0'), text[: len(text) // 2], "[" * 50_000):
        path.write_text(other)
        assert read_record(export) == {}
    path.write_text(text)
    assert read_record(export) == {"accuracy": {"shapes": {"kNN": {"top1": 50.0}}}}


def test_former_names_are_read_and_new_ones_written(export):
    add_result(export, "equivariance", "shapes", measured(label=14.5))
    path = export / "evaluation.json"
    text = path.read_text()
    for new, old in (("attributes", "kept"), ("grayscale", "greyscale"), ("variance", "spread")):
        assert f'"{new}"' in text
        text = text.replace(f'"{new}"', f'"{old}"')
    path.write_text(text)
    assert read_record(export) == {"equivariance": {"shapes": measured(label=14.5)}}
    add_result(export, "accuracy", "shapes", {"kNN": {"top1": 50.0}})
    text = path.read_text()
    assert not any(word in text for word in ("kept", "greyscale", "spread"))
    assert all(word in text for word in ('"attributes"', '"grayscale"', '"variance"', '"kNN"'))
    write_card(export)
    assert "| grayscale | - |" in (export / "README.md").read_text()


def add_250(folder, name, together):
    together.wait()
    for k in range(250):
        add_result(folder, "accuracy", "shapes", {f"{name} {k}": {"top1": float(k)}})
        if k % 50 == 0:
            head = LinearHead(f"{name}{k}", torch.ones(2, 128), torch.ones(2), ["a", "b"], {"top1": 1.0})
            head.save(folder)
    write_card(folder)


@pytest.mark.launches
def test_two_processes_that_record_at_the_same_time_lose_nothing(export, tmp_path):
    before, together, processes = set(visible(export)), FORKS.Barrier(2, timeout=60), {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        processes[name] = start(tmp_path / name, add_250, export, name, together)
    for name, process in processes.items():
        assert status(process) == 0 and (tmp_path / name / "stderr").read_text() == ""
    labels = read_record(export)["accuracy"]["shapes"]
    assert set(labels) == {f"{name} {k}" for name in ("one", "two") for k in range(250)}
    heads = {f"linear_head.{name}{k}.safetensors" for name in ("one", "two") for k in range(0, 250, 50)}
    assert set(visible(export)) - before == heads | {"evaluation.json"}
    assert heads < {head_file_name(head.dataset) for head in read_heads(export)}
    card = (export / "README.md").read_text()
    assert "| one 249 top-1 (backbone) |" in card and "| two 249 top-1 (backbone) |" in card

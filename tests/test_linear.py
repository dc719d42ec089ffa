"""Linear probes: the optimum of a convex problem, on features of an encoder that nothing touches."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from huggingface_hub import ModelCard

import care_hub
from care_hub import cli
from care_hub.evaluate import commands
from care_hub.evaluate.linear import PENALTIES, choose_penalty, fit_linear
from care_hub.measures import topk


def eval_linear(*words):
    return CliRunner().invoke(cli.eval_linear, [str(w) for w in words])


def clusters(n: int, noise: float, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    centres, y = torch.randn(4, 6, generator=torch.Generator().manual_seed(9)), torch.randint(0, 4, (n,), generator=g)
    return 5 + 3 * (centres[y] + noise * torch.randn(n, 6, generator=g)), y


def test_the_head_is_the_optimum_of_its_objective():
    x, y = clusters(300, 0.7)
    x = x.double()
    weight, bias = fit_linear(x, y, 4, 1e-2)
    std, mean = x.std(dim=0), x.mean(dim=0)
    scaled, shifted = (weight * std).requires_grad_(), (bias + weight @ mean).requires_grad_()
    loss = F.cross_entropy((x - mean) / std @ scaled.T + shifted, y) + 1e-2 * scaled.square().sum() / 2
    assert max(g.abs().max() for g in torch.autograd.grad(loss, (scaled, shifted))) < 1e-4
    held, truth = clusters(1000, 0.7, seed=1)
    assert topk(held.double() @ weight.T + bias, truth, 1) > 85 and topk(held.double() @ weight.T + bias, truth, 4) == 100


def test_a_start_does_not_change_the_optimum():
    x, y = clusters(300, 0.7)
    x = x.double()
    cold, warm = fit_linear(x, y, 4, 1e-2), fit_linear(x, y, 4, 1e-2, start=fit_linear(x, y, 4, 1.0))
    torch.testing.assert_close(warm, cold, rtol=1e-3, atol=1e-3)


def test_the_penalty_is_chosen_on_training_images():
    x, y = clusters(60, 3.0)
    x = torch.cat([x, torch.randn(60, 60, generator=torch.Generator().manual_seed(2))], dim=1)
    assert choose_penalty(x, y, 4)[0] in PENALTIES[:3]  # noise in 60 of 66 features wants a strong one
    assert choose_penalty(x, y, 4, seed=1)[0] in PENALTIES


def test_eval_linear_saves_head_card_and_result(tiny_run, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_run, folder)
    weights = (folder / "export" / "model.safetensors").read_bytes()
    done = eval_linear("--encoder", folder, "--dataset-name", "shapes")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["encoder"] == str(folder) and result["dataset"] == "shapes"
    assert (result["n_train"], result["n_test"]) == (5000, 2000) and 10 < result["top1"] < result["top5"] < 100
    assert (folder / "export" / "model.safetensors").read_bytes() == weights
    head = care_hub.load_linear_head(folder, dataset="shapes")
    assert head.metrics["top1"] == result["top1"] and head.class_names[0] == "circle"
    values = {r.metric_name: r.metric_value for r in ModelCard.load(folder / "export" / "README.md").data.eval_results}
    assert values["linear probe top-1 (backbone)"] == result["top1"]


def test_a_head_goes_where_it_is_told(photos, tmp_path):
    name = care_hub.list_models(pretrained=True)[0]
    words = ("--dataset-name", "imagefolder", "--data-root", photos, "--output-dir", tmp_path / "o")
    result = json.loads(eval_linear("--encoder", name, *words).stdout.splitlines()[-1])
    assert (result["n_train"], result["n_test"], result["top5"]) == (48, 16, 100)
    labels, probabilities = care_hub.load_classifier(tmp_path / "o", dataset="imagefolder").classify(photos / "test")
    right = sum(label == ("cold" if k < 8 else "warm") for k, label in enumerate(labels))
    assert 100 * right / 16 == result["top1"] and probabilities.shape == (16, 2)


def test_a_place_that_can_not_be_written_is_refused_before_the_work(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(commands, "probe", lambda *_: pytest.fail("the probe was trained"))
    done = eval_linear("--encoder", tiny_run, "--dataset-name", "shapes", "--output-dir", tmp_path / "file" / "o")
    assert done.exit_code == 1 and "can't be written" in done.output and "Traceback" not in done.output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--encoder", "resnet10_w16_small", "--dataset-name", "shapes"], "--output-dir"),
        (["--encoder", "absent", "--dataset-name", "shapes"], "not in the registry"),
        (["--encoder", "{tiny}", "--dataset-name", "shape"], "did you mean 'shapes'"),
        (["--encoder", "{tiny}", "--dataset-name", "imagefolder"], "needs --data-root"),
    ],
)
def test_what_a_person_gets_wrong(words, sentence, tiny_run):
    done = eval_linear(*(w.format(tiny=tiny_run) for w in words))
    assert done.exit_code == 1 and sentence in done.output and "Traceback" not in done.output

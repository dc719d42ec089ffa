"""Linear probes: the optimum of a convex problem, on features of an encoder that nothing touches."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from care_hub.config import DataConfig, EvalConfig
from care_hub.data.sources import load_splits
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.evaluate.features import labeled
from care_hub.evaluate.linear import PENALTIES, choose_penalty, fit_best, fit_linear, fit_sgd, linear_probe
from care_hub.metrics import topk_accuracy


def clusters(n: int, noise: float, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    y = torch.randint(0, 4, (n,), generator=g)
    return 5 + 3 * (centers[y] + noise * torch.randn(n, 6, generator=g)), y


def splits(photos):
    data = DataConfig("imagefolder", data_root=str(photos))
    return labeled("imagefolder", *load_splits(data, size=32, progress=False))


def probe(encoder: Encoder, train, test, **options):
    config = EvalConfig("imagefolder", encoder="here", **options)
    (head,) = linear_probe(encoder, train, test, Accelerator(cpu=True), config)
    return head


def test_the_head_is_the_optimum_of_its_objective():
    x, y = clusters(300, 0.7)
    x = x.double()
    weight, bias = fit_linear(x, y, 4, 1e-2)
    std, mean = x.std(dim=0), x.mean(dim=0)
    scaled, shifted = (weight * std).requires_grad_(), (bias + weight @ mean).requires_grad_()
    loss = F.cross_entropy((x - mean) / std @ scaled.T + shifted, y) + 1e-2 * scaled.square().sum() / 2
    assert max(g.abs().max() for g in torch.autograd.grad(loss, (scaled, shifted))) < 1e-4
    held_out, truth = clusters(1000, 0.7, seed=1)
    logits = held_out.double() @ weight.T + bias
    assert topk_accuracy(logits, truth, 1) > 85 and topk_accuracy(logits, truth, 4) == 100


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


def test_the_published_schedule_starts_from_the_weights_that_its_seed_gives():
    x, y = clusters(40, 0.7)
    torch.manual_seed(3)
    expected = torch.nn.Linear(6, 4)
    for optimizer in ("adam", "sgd"):
        config = EvalConfig("shapes", encoder="here", protocol="sgd", optimizer=optimizer, lr=1e-20, epochs=1)
        weight, bias = fit_sgd(x[None], y, 4, config, seed=3)
        assert torch.equal(weight, expected.weight) and torch.equal(bias, expected.bias)


def test_a_probe_leaves_the_encoder_as_it_was_and_the_order_of_test_images_changes_nothing(tiny_run, photos):
    encoder, (train, test) = Encoder.from_pretrained(tiny_run), splits(photos)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    head = probe(encoder, train, test)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    again = probe(encoder, train, test.take(torch.arange(len(test)).flip(0)))
    assert again.metrics["top1"] == head.metrics["top1"] and torch.equal(again.weight, head.weight)


@pytest.mark.parametrize(
    "options",
    [{}, {"protocol": "sgd", "augmented_copies": 1}, {"protocol": "sgd", "optimizer": "sgd"}],
    ids=["lbfgs", "adam", "sgd"],
)
def test_a_probe_leaves_the_random_numbers_of_the_process_alone(tiny_run, photos, options):
    """The same state before and after; and whatever it was, the result is the same."""
    encoder, (train, test) = Encoder.from_pretrained(tiny_run), splits(photos)
    state = torch.get_rng_state()
    head = probe(encoder, train, test, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(probe(encoder, train, test, **options).weight, head.weight)


def test_an_encoder_left_in_train_mode_is_noticed(tiny_run, photos, monkeypatch):
    encoder, (train, test) = Encoder.from_pretrained(tiny_run), splits(photos)
    monkeypatch.setattr(Encoder, "eval", lambda self: self.train())
    with pytest.raises(CareHubError, match="the encoder changed"):
        probe(encoder.train(), train, test)


def test_shuffled_test_labels_are_noticed(tiny_run, photos):
    """Warm and cold images are easily told apart; only a broken evaluation says otherwise."""
    encoder, (train, test) = Encoder.from_pretrained(tiny_run), splits(photos)
    assert probe(encoder, train, test).metrics["top1"] > 85
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    assert probe(encoder, train, replace(test, labels=test.labels[order])).metrics["top1"] < 75


@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_images_make_a_probe(count):
    """A fold may leave one image to train on."""
    labels = torch.arange(count) % 2
    weight, bias, _ = fit_best(torch.eye(count), labels, 2)
    assert torch.equal((torch.eye(count) @ weight.T + bias).argmax(dim=1), labels)
    with pytest.raises(CareHubError, match="at least 2"):
        fit_best(torch.eye(1), labels[:1], 2)

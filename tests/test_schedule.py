"""Learning rate and lambda at every step, and what follows from options and data."""

import pytest

from care_hub.config import TrainConfig
from care_hub.errors import CareHubError
from care_hub.schedule import Plan, lr_at, weight_at


def test_learning_rate_schedule():
    rates = [lr_at(s, 100, 10, 1.0, "cosine") for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1
    assert rates[55] == pytest.approx(0.5) and rates[99] < 0.001
    assert lr_at(99, 100, 0, 0.3, "constant") == 0.3


def test_lambda_grows_and_then_stays():
    assert [weight_at(s, 0, 4, 2.0) for s in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert [weight_at(s, 3, 2, 2.0) for s in range(6)] == [0, 0, 0, 1.0, 2.0, 2.0]
    assert weight_at(0, 0, 0, 0.3) == 0.3


def test_a_plan_counts_optimizer_steps():
    config = TrainConfig(batch_size=16, gradient_accumulation=2, epochs=3, max_steps=5, warmup_epochs=0.5)
    plan = Plan.of(config, 100)
    assert (plan.steps_per_epoch, plan.steps, plan.stop, plan.warmup) == (3, 9, 5, 2)
    late = Plan.of(
        TrainConfig(batch_size=16, epochs=2, weight_start_epochs=1.99, weight_warmup_epochs=0.5), 96
    )
    assert (late.weight_start, late.weight_warmup) == (11, 3)  # one step of twelve is left
    usual = Plan.of(TrainConfig(batch_size=16, epochs=5), 160)
    assert (usual.weight_start, usual.weight_warmup) == (40, 2)  # the last fifth, and a quarter of that
    with pytest.raises(CareHubError, match="31 training images are fewer than the 32"):
        Plan.of(config, 31)


@pytest.mark.parametrize(
    ("options", "price"),
    [
        ({"weight": 0.0}, 40),
        ({}, 80),  # four views instead of two, each with a backward pass
        ({"views": "shared"}, 40),
        ({"equivariant_batch_size": 8, "equiv_splits": 4}, 60),
        ({"weight_start_epochs": 3}, 50),
        ({"weight_start_epochs": 1, "max_steps": 15}, 20),
        ({"weight_start_epochs": 2, "max_steps": 15}, 15),
        ({"method": "moco", "weight": 0.0}, 40),
        ({"method": "moco"}, 100),  # two views more, each as dear as a query's; a key costs a third
        ({"method": "moco", "views": "shared"}, 100),  # whose keys have no gradient
    ],
)
def test_the_price_of_a_run_in_steps_of_the_plain_method(options, price):
    config = TrainConfig(**{"batch_size": 16, "epochs": 4, "weight_start_epochs": 0} | options)
    plan = Plan.of(config, 160)
    assert plan.price(config) == pytest.approx(price)
    middle = 12
    alone = sum(plan.price(config, k) - plan.price(config, k + 1) for k in range(middle))
    assert alone + plan.price(config, middle) == pytest.approx(price)

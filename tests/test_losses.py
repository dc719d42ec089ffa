"""The losses are those of the public code, in value and gradient, and survive half precision."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from care_hub import losses
from care_hub.errors import CareHubError

REFERENCE = "reference/official_values.safetensors"


def unit(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def slow_info_nce(z1, z2, t):
    z, total = torch.cat([z1, z2]), 0
    for i in range(len(z)):
        p = (i + len(z1)) % len(z)
        denominator = sum(math.exp(float(z[i] @ z[k]) / t) for k in range(len(z)) if k != i)
        total -= math.log(math.exp(float(z[i] @ z[p]) / t) / denominator)
    return total / len(z)


def slow_uniformity(z1, z2, t, own_view=False):
    z, total = torch.cat([z1, z2]), 0
    for i in range(len(z)):
        own = {i} if own_view else {i, (i + len(z1)) % len(z)}
        negatives = (k for k in range(len(z)) if k not in own)
        total += math.log(sum(math.exp(float(z[i] @ z[k]) / t) for k in negatives))
    return total / len(z)


def slow_equivariance(z1, z2, groups):
    m, total = len(z1) // groups, 0
    for g in range(groups):
        rows = range(g * m, (g + 1) * m)
        pairs = ((i, j) for i in rows for j in rows if i != j)
        total += sum(2 * float(z1[i] @ z1[j] - z2[i] @ z2[j]) ** 2 for i, j in pairs) / m
    return total / groups


def test_losses_equal_their_definition_written_out():
    z1, z2 = unit(12, 5), unit(12, 5, seed=1)
    assert math.isclose(losses.info_nce(z1, z2, 0.3), slow_info_nce(z1, z2, 0.3), rel_tol=1e-12)
    assert math.isclose(losses.uniformity(z1, z2, 0.3), slow_uniformity(z1, z2, 0.3), rel_tol=1e-12)
    with_own = losses.uniformity(z1, z2, 0.3, own_view=True)
    assert math.isclose(with_own, slow_uniformity(z1, z2, 0.3, own_view=True), rel_tol=1e-12)
    assert math.isclose(losses.equivariance(z1, z2, 3), slow_equivariance(z1, z2, 3), rel_tol=1e-12)
    parts = losses.alignment(z1, z2, 0.3) + losses.uniformity(z1, z2, 0.3)
    assert parts < losses.info_nce(z1, z2, 0.3)  # uniformity leaves the positive out of its sum


@pytest.mark.parametrize("case", range(4))
def test_losses_and_gradients_equal_the_public_code(shared, case):
    path, prefix = shared(REFERENCE), f"case{case}."
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["cases"])[f"case{case}"]
    values = {k.removeprefix(prefix): v for k, v in load_file(path).items() if k.startswith(prefix)}
    t, groups = settings["temperature"], settings["num_chunks"]
    for name, function, argument in (
        ("infonce", losses.info_nce, t),
        ("alignment", losses.alignment, t),
        ("uniformity", losses.uniformity, t),
        ("equivariance", losses.equivariance, groups),
    ):
        z1, z2 = (values[k].clone().requires_grad_() for k in ("z1", "z2"))
        loss = function(z1, z2, argument)
        torch.testing.assert_close(loss, values[name].squeeze(), rtol=1e-12, atol=1e-12)
        if f"{name}.grad_z1" in values:
            loss.backward()
            torch.testing.assert_close(z1.grad, values[f"{name}.grad_z1"], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(z2.grad, values[f"{name}.grad_z2"], rtol=1e-12, atol=1e-12)


def test_moco_equals_the_public_code(shared):
    v = {k: t for k, t in load_file(shared(REFERENCE)).items() if k.startswith("moco.")}
    query = v["moco.q"].clone().requires_grad_()
    loss = losses.moco(query, v["moco.k"], v["moco.queue"].T, 0.2)
    loss.backward()
    torch.testing.assert_close(loss, v["moco.loss"].squeeze(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(query.grad, v["moco.grad_q"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_close_at_temperature_007(dtype):
    z1 = unit(64, 32, dtype=torch.float32)
    z2 = F.normalize(z1 + 0.01 * unit(64, 32, seed=1, dtype=torch.float32), dim=1)
    exact = losses.info_nce(z1, z2, 0.07)
    half = [z.to(dtype).requires_grad_() for z in (z1, z2)]
    loss = losses.info_nce(*half, 0.07)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(z.grad).all() for z in half)
    assert abs(loss.item() - exact.item()) < 0.05
    assert torch.isfinite(losses.equivariance(*half, 8))


def test_equivariance_is_zero_exactly_for_a_common_rotation_of_each_group():
    z = unit(32, 8)
    generator = torch.Generator().manual_seed(3)
    rotations = torch.linalg.qr(torch.randn(4, 8, 8, dtype=torch.float64, generator=generator)).Q
    rotated = torch.einsum("gde,gme->gmd", rotations, z.view(4, 8, 8)).reshape(32, 8)
    assert losses.equivariance(z, rotated, 4) < 1e-28
    assert losses.equivariance(z, rotated, 2) > 1e-3  # not for groups with two rotations in them


def test_a_batch_that_does_not_divide_into_groups_is_refused():
    with pytest.raises(CareHubError, match="equal groups"):
        losses.equivariance(unit(10, 4), unit(10, 4), 3)
    with pytest.raises(CareHubError, match="at least 2"):
        losses.equivariance(unit(10, 4), unit(10, 4), 10)


def test_subtypes():
    z1, z2 = unit(8, 4), unit(8, 4, seed=1)
    assert losses.contrastive(z1, z2, 0.5, "none") == 0
    assert losses.contrastive(z1, z2, 0.5) == losses.info_nce(z1, z2, 0.5)
    assert losses.contrastive(z1, z2, 0.5, "alignment") == losses.alignment(z1, z2, 0.5)
    assert losses.contrastive(z1, z2, 0.5, "uniformity") == losses.uniformity(z1, z2, 0.5)
    with pytest.raises(CareHubError, match="infonce"):
        losses.contrastive(z1, z2, 0.5, "info")

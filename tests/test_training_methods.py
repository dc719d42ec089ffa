"""SimCLR and MoCo-v2: what they compare, and what moves."""

import pytest
import torch

from care_hub import losses
from care_hub.encoder import Encoder
from care_hub.training.methods import MoCo, SimCLR, Steering


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Encoder.new("resnet10_w16_small", hidden=16, outputs=8)


def views(n=8, seed=0):
    return torch.randn(2 * n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_simclr_is_info_nce_plus_weighted_equivariance(encoder):
    found = SimCLR(encoder, 0.5, 0.3, 4)(views(), views(seed=1))
    z1, z2 = encoder(views()).chunk(2)
    w1, w2 = encoder(views(seed=1)).chunk(2)
    torch.testing.assert_close(found["infonce"], losses.info_nce(z1, z2, 0.5))
    torch.testing.assert_close(
        found["loss"], losses.info_nce(z1, z2, 0.5) + 0.3 * losses.equivariance(w1, w2, 4)
    )
    shared = SimCLR(encoder, 0.5, 0.3, 4)(views())
    torch.testing.assert_close(shared["equivariance"], losses.equivariance(z1, z2, 4))
    half = SimCLR(encoder, 0.5, 0.3, 2, stride=2)(views())
    torch.testing.assert_close(half["equivariance"], losses.equivariance(z1[::2], z2[::2], 2))
    assert torch.equal(half["infonce"], found["infonce"])


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_a_steering_head_rotates_and_infonce_has_a_head_of_its_own(encoder, method):
    encoder.set_contrastive_head(True)
    plain = Encoder.new("resnet10_w16_small", hidden=16, outputs=8)
    plain.backbone, plain.projection = encoder.backbone, encoder.contrastive_head

    def made(encoder, weight, **spread):
        torch.manual_seed(0)  # of the queue
        few = (encoder, 0.5, weight, 4)
        return SimCLR(*few, **spread) if method == "simclr" else MoCo(*few, 1, 16, 0.9, 8, **spread)

    steering = made(encoder, 0.3, spread=(0.4, 0.1))
    found = steering(views(), views(seed=1))
    expected = made(plain, 0.0)(views())["infonce"]
    torch.testing.assert_close(found["infonce"], expected)
    w1, w2 = encoder(views(seed=1)).chunk(2)
    torch.testing.assert_close(found["equivariance"], losses.equivariance(w1, w2, 4))
    torch.testing.assert_close(found["uniformity"], losses.uniformity(w1, w2, 0.1, own_view=True))
    on_projection = found["equivariance"] + 0.4 * found["uniformity"]
    torch.testing.assert_close(found["loss"], found["infonce"] + 0.3 * on_projection)
    alone = Steering(encoder, 0.5, 0.3, 4, spread=(0.4, 0.1))(views(seed=1))
    assert alone.keys() == found.keys() and alone["infonce"] == 0
    torch.testing.assert_close(alone["loss"], 0.3 * on_projection)
    torch.testing.assert_close(steering(views())["uniformity"], losses.uniformity(
        *encoder(views()).chunk(2), 0.1, own_view=True))  # fmt: skip

    steering.weight = 0.0  # of a lambda that has not begun: every parameter has a gradient all the same
    waiting = steering(views())
    assert waiting["uniformity"] == waiting["equivariance"] == 0
    waiting["loss"].backward()
    assert all((p.grad == 0).all() for p in encoder.projection.parameters())
    assert all(p.grad.any() for p in encoder.contrastive_head[3].parameters())


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_group_views_change_nothing_in_the_contrastive_part(encoder, method):
    def first(weight):
        torch.manual_seed(0)
        m = (
            SimCLR(encoder, 0.5, weight, 4)
            if method == "simclr"
            else MoCo(encoder, 0.5, weight, 4, 1, 16, 0.9, 8)
        )
        return m(views(), views(seed=1) if weight else None)["infonce"]

    assert torch.equal(first(0.0), first(0.3))


def test_moco_scores_before_it_enqueues_and_wraps_around(encoder):
    moco = MoCo(encoder, 0.2, 0.0, 4, 1, queue_size=16, momentum=0.9, dim=8)
    before = moco.queue.clone()
    q, k = encoder(views()[:8]), moco.key_encoder(views()[8:])
    moco.key_encoder.load_state_dict(encoder.state_dict())
    loss = moco(views())["loss"]
    torch.testing.assert_close(loss, losses.moco(q, k, before, 0.2))  # the queue as it was
    torch.testing.assert_close(moco.queue[:8], k)
    assert torch.equal(moco.queue[8:], before[8:]) and moco.place == 8
    moco(views(seed=2))
    moco(views(seed=3))
    assert moco.place == 8 and not torch.equal(moco.queue[:8], k)
    loss.backward()
    assert all(p.grad is None for p in moco.key_encoder.parameters())
    assert all(p.grad is not None for p in encoder.parameters())


def test_the_key_encoder_follows_once_a_step(encoder):
    moco = MoCo(encoder, 0.2, 0.0, 4, 1, queue_size=16, momentum=0.75, dim=8)
    old = encoder.backbone.conv1.weight.detach().clone()
    with torch.no_grad():
        encoder.backbone.conv1.weight.add_(1)
    moco(views())
    assert torch.equal(moco.key_encoder.backbone.conv1.weight, old)
    moco.after_step()
    torch.testing.assert_close(moco.key_encoder.backbone.conv1.weight, old + 0.25)

"""A rotation can be fitted, applied, composed, inverted, taken in part, and saved."""

import numpy as np
import pytest
import torch
from helpers import care_hub_command

import care_hub
from care_hub.errors import CareHubError
from care_hub.rotation import Rotation, least_squares, planes


def sphere(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, dtype=torch.float64, generator=generator)
    return torch.nn.functional.normalize(z, dim=1)


def tiny_encoder():
    return care_hub.Encoder.new("resnet10_w16_small", hidden=8, outputs=4)


def test_a_known_rotation_is_found_again_from_noisy_embeddings():
    truth, z = Rotation.random(16, seed=3), sphere(500, 16)
    found = Rotation.fit(z, truth(z))
    torch.testing.assert_close(found.matrix, truth.matrix)
    noisy = Rotation.fit(z, truth(z) + 0.05 * sphere(500, 16, seed=1))
    assert (noisy.matrix - truth.matrix).abs().max() < 0.05
    assert noisy.residual(z, truth(z)) < 1e-3 < Rotation.random(16, seed=4).residual(z, truth(z))


def test_fitting_is_the_best_of_all_rotations():
    z, z_t = sphere(50, 4), sphere(50, 4, seed=1)
    best = Rotation.fit(z, z_t).residual(z, z_t)
    proper = Rotation.fit(z, z_t, special=True)
    assert torch.linalg.det(proper.matrix) > 0 and proper.residual(z, z_t) >= best - 1e-12
    for seed in range(200):
        assert Rotation.random(4, seed).residual(z, z_t) >= proper.residual(z, z_t) - 1e-9


def test_linear_maps_are_found_one_by_one_or_many_at_once():
    z, maps = sphere(50, 4), torch.stack([sphere(4, 4, seed) for seed in (1, 2, 3)])
    found = least_squares(z, z @ maps.mT)
    torch.testing.assert_close(found, maps, atol=0.01, rtol=0)
    torch.testing.assert_close(found[2], least_squares(z, z @ maps[2].T))


def test_what_goes_in_comes_out():
    r, z = Rotation.random(8), sphere(3, 8)
    for value in (z, z.float(), z.numpy(), z.numpy().astype(np.float32)):
        turned = r(value)
        assert type(turned) is type(value) and turned.dtype == value.dtype and turned.shape == value.shape
        np.testing.assert_allclose(np.asarray(turned), (r.matrix @ z.T).T.numpy(), atol=1e-6)
    with pytest.raises(CareHubError, match=r"8 floats, got torch.float32 of shape \(2, 7\)"):
        r(torch.zeros(2, 7))


def test_composition_and_inverse():
    a, b, z = Rotation.random(6, 1), Rotation.random(6, 2), sphere(5, 6)
    torch.testing.assert_close((a @ b)(z), a(b(z)))
    torch.testing.assert_close((a @ a.inv()).matrix, torch.eye(6, dtype=torch.float64))
    with pytest.raises(CareHubError, match="different embedding spaces"):
        a @ Rotation.random(5)
    mine, other = Rotation(a.matrix, "mine"), Rotation(b.matrix, "other")
    assert (mine @ a).encoder == (a @ mine).encoder == "mine"
    with pytest.raises(CareHubError, match="different embedding spaces"):
        mine @ other


@pytest.mark.parametrize("d", [2, 3, 16, 33])
def test_half_a_rotation_twice_is_the_rotation(d):
    def angles(rotation):
        return torch.linalg.eigvals(rotation.matrix).angle().abs().sort().values

    r = Rotation.random(d, seed=d)
    half = r.power(0.5)
    torch.testing.assert_close((half @ half).matrix, r.matrix)
    torch.testing.assert_close((r.power(1 / 3) @ r.power(2 / 3)).matrix, r.matrix)
    torch.testing.assert_close(r.power(-1).matrix, r.inv().matrix)
    torch.testing.assert_close(r.power(3).matrix, (r @ r @ r).matrix)
    torch.testing.assert_close(angles(half), angles(r) / 2, atol=1e-7, rtol=0)


@pytest.mark.parametrize("diagonal", [[-1, -1], [-1, -1, 1], [-1, -1, -1, -1, 1, 1], [1, 1, 1]])
def test_half_of_half_turns(diagonal):
    basis = Rotation.random(len(diagonal), 7).matrix
    r = Rotation(basis @ torch.diag(torch.tensor(diagonal, dtype=torch.float64)) @ basis.T)
    half = r.power(0.5)
    torch.testing.assert_close((half @ half).matrix, r.matrix)


@pytest.mark.parametrize("diagonal", [[1] * 9, [-1] * 4 + [1] * 5])
def test_a_rotation_turns_in_planes_and_leaves_the_rest(diagonal):
    r = Rotation.random(9, 7).power(0.3).matrix @ torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    a, b, angles = planes(r)
    assert a.shape == b.shape == (9, 4) and angles.min() > 0 and angles.max() <= np.pi
    torch.testing.assert_close(r @ a, a * angles.cos() + b * angles.sin())
    torch.testing.assert_close(r @ b, b * angles.cos() - a * angles.sin())
    basis = torch.cat([a, b], dim=1)
    torch.testing.assert_close(basis.T @ basis, torch.eye(8, dtype=torch.float64))
    rest = torch.eye(9, dtype=torch.float64) - basis @ basis.T
    torch.testing.assert_close(r @ rest, rest)
    assert [len(part.T) for part in planes(torch.eye(3, dtype=torch.float64))[:2]] == [0, 0]


def test_many_at_once():
    truth = torch.stack([Rotation.random(5, k).matrix for k in range(3)])
    z = torch.stack([sphere(40, 5, k) for k in range(3)])
    found = Rotation.fit(z, z @ truth.transpose(1, 2), special=True)
    torch.testing.assert_close(found.matrix, truth)
    torch.testing.assert_close(found.power(0.5)(found.power(0.5)(z)), found(z))


def test_a_reflection_has_no_fractional_power():
    mirror = Rotation(torch.diag(torch.tensor([1.0, 1.0, -1.0])))
    with pytest.raises(CareHubError, match="special=True"):
        mirror.power(0.5)
    torch.testing.assert_close(mirror.power(2).matrix, torch.eye(3, dtype=torch.float64))


def test_saved_in_a_file_it_is_the_same(tmp_path):
    z, encoder, other = sphere(30, 4), tiny_encoder(), tiny_encoder()
    r = Rotation.fit(z, sphere(30, 4, 1), encoder=encoder)
    loaded = Rotation.load(r.save(tmp_path / "r.safetensors"))
    assert torch.equal(loaded.matrix, r.matrix) and loaded.encoder == r.encoder
    loaded.check(encoder)
    encoder.save_pretrained(tmp_path / "e")
    loaded.check(care_hub.load_encoder(tmp_path / "e"))
    with pytest.raises(CareHubError, match="another encoder"):
        loaded.check(other)
    (tmp_path / "half").write_bytes((tmp_path / "r.safetensors").read_bytes()[:60])
    with pytest.raises(CareHubError, match="not a rotation"):
        Rotation.load(tmp_path / "half")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Rotation(torch.ones(3, 3)), "not orthogonal"),
        (lambda: Rotation(torch.full((3, 3), float("nan"))), "not orthogonal"),
        (lambda: Rotation(torch.ones(3, 2)), "square"),
        (lambda: Rotation.fit(torch.ones(3, 2), torch.ones(4, 2)), "as many embeddings"),
        (lambda: Rotation.fit(torch.ones(3, 2) * float("nan"), torch.ones(3, 2)), "not finite"),
    ],
)
def test_what_is_no_rotation_is_refused(call, message):
    with pytest.raises(CareHubError, match=message):
        call()


def test_a_file_of_embeddings_says_whose_they_are(tiny_run, photos, tmp_path):
    mine, other = care_hub.load_encoder(tiny_run), tiny_encoder()
    z = mine.encode(photos / "test")
    for suffix in ("parquet", "safetensors"):
        path = tmp_path / f"z.{suffix}"
        care_hub_command("embed", photos / "test", "--encoder", tiny_run, "-o", path)
        r = Rotation.fit(z, z, encoder=care_hub.fingerprint_of(path))
        assert r.encoder == mine.fingerprint
        r.check(mine)
        r.check(care_hub.fingerprint_of(path))
        with pytest.raises(CareHubError, match="another encoder"):
            r.check(other)
        for name in (path, str(path)):  # not a fingerprint, and not taken for one
            with pytest.raises(CareHubError, match=r"`encoder=care_hub\.fingerprint_of\('.*'\)`"):
                r.check(name)


def test_many_rows_are_fitted_in_chunks():
    """More rows than are raised to float64 at a time give what all at once give."""
    z = torch.randn(150_000, 3, generator=torch.Generator().manual_seed(0))
    r = Rotation.random(3, seed=4)
    torch.testing.assert_close(Rotation.fit(z, r(z)).matrix, r.matrix, atol=1e-6, rtol=0)

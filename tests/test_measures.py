"""kNN and the rotation measures, on encoders where the answer is known."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from care_hub.evaluate.equivariance import rotation_errors
from care_hub.measures import knn_scores, knn_top1
from care_hub.rotation import procrustes


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def test_knn_votes_equal_the_public_code(shared):
    v = {k.removeprefix("knn."): t for k, t in load_file(shared("reference/official_values.safetensors")).items() if "knn." in k}
    scores = knn_scores(v["bank"], v["bank_labels"], v["query"], 10, k=200, temperature=0.5)
    torch.testing.assert_close(scores, v["scores"], rtol=1e-4, atol=1e-3)


def test_knn_on_clusters_and_on_noise():
    centres, labels = normal(5, 16), torch.arange(1000) % 5
    bank, queries = centres[labels] + 0.1 * normal(1000, 16, seed=1), centres[labels] + 0.1 * normal(1000, 16, seed=2)
    assert knn_top1(bank, labels, queries, labels) == 100
    assert 12 < knn_top1(normal(1000, 16), labels, normal(1000, 16, seed=3), labels) < 28
    assert knn_top1(bank[:10], labels[:10], queries, labels, k=1, temperature=0.1) == 100


def test_procrustes_recovers_a_rotation_and_special_ones_have_determinant_one():
    z, mirrored = normal(50, 6), rotation(6)
    mirrored[0] *= -torch.linalg.det(mirrored).sign()  # determinant -1
    torch.testing.assert_close(procrustes(z, z @ mirrored.T), mirrored)
    special = procrustes(z, z @ mirrored.T, special=True)
    assert torch.linalg.det(special) == pytest.approx(1) and torch.allclose(special @ special.T, torch.eye(6, dtype=torch.float64))
    best = (z @ mirrored.T - z @ special.T).square().sum()
    for seed in range(20):
        other = rotation(6, seed) * torch.linalg.det(rotation(6, seed)).sign() ** torch.tensor([1.0, 0, 0, 0, 0, 0]).double()[:, None]
        assert (z @ mirrored.T - z @ other.T).square().sum() >= best
    many = procrustes(torch.stack([z, z]), torch.stack([z @ mirrored.T, z]))
    torch.testing.assert_close(many[1], torch.eye(6, dtype=torch.float64))


def test_an_encoder_that_rotates_has_no_rotation_error():
    z = F.normalize(normal(200, 8), dim=1)
    found = rotation_errors(z, [z @ rotation(8, seed).T for seed in (1, 2)])
    assert found["rotation_error"] < 1e-20 and found["rotation_invariance_ratio"] < 1e-20 and found["gram_deviation"] < 1e-20
    assert found["invariance_error"] > 0.5


def test_an_invariant_encoder_has_no_invariance_error():
    z = F.normalize(normal(200, 8), dim=1)
    assert rotation_errors(z, [z])["invariance_error"] == 0


def test_an_encoder_that_forgets_everything_gains_nothing_by_rotating():
    """Independent unit vectors: |a - b|^2 = 2 on average; a rotation fitted on 1,000 others keeps about 2."""
    found = rotation_errors(F.normalize(normal(2000, 16), dim=1), [F.normalize(normal(2000, 16, seed=1), dim=1)])
    assert found["invariance_error"] == pytest.approx(2, abs=0.1) and 0.9 < found["rotation_invariance_ratio"] < 1.1
    assert found["gram_deviation"] == pytest.approx(2 / 16, rel=0.1)  # two independent inner products of variance 1/d

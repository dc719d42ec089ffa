"""kNN and the rotation measures, on encoders where the answer is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from care_hub import augment, measures
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


def unit(n, d, seed):
    return F.normalize(normal(n, d, seed=seed), dim=1)


def test_every_formula_equals_its_definition_written_out():
    z, z_a, r = unit(9, 4, 1), unit(9, 4, 2), rotation(4)
    n = range(9)
    square = lambda v: sum(float(x) ** 2 for x in v)  # noqa: E731
    dot = lambda u, v: sum(float(a) * float(b) for a, b in zip(u, v, strict=True))  # noqa: E731
    invariance = measures.invariance(z, z_a)
    residual = measures.residual(z, z_a, r)
    gram, gamma = measures.gram_deviation(z, z_a), measures.relative_equivariance(z, z_a)
    for i in n:
        turned = [dot(row, z[i]) for row in r]
        assert invariance[i].item() == pytest.approx(square(z_a[i] - z[i]))
        assert residual[i].item() == pytest.approx(square([a - t for a, t in zip(z_a[i], turned, strict=True)]))
        for j in n:
            assert gram[i, j].item() == pytest.approx((dot(z_a[i], z_a[j]) - dot(z[i], z[j])) ** 2, abs=1e-15)
            above = (square(z_a[j] - z_a[i]) - square(z[j] - z[i])) ** 2
            below = (square(z_a[j] - z[j]) + square(z_a[i] - z[i])) ** 2
            assert gamma[i, j].item() == pytest.approx(above / below, abs=1e-15)
    cosines = [[dot(q, c) for c in z_a] for q in z]
    ranks = [1 + sum(cosines[i][j] > cosines[i][i] for j in n if j != i) for i in n]
    assert measures.retrieval_ranks(z, z_a).tolist() == ranks
    centre = [sum(float(v[k]) for v in z) / 9 for k in range(4)]
    assert measures.spread(z).mean().item() == pytest.approx(1 - square(centre))
    s, t = rotation(4, 5), rotation(4, 6)
    written_out = sum((float(r[i, j]) - sum(float(s[i, k] * t[k, j]) for k in range(4))) ** 2 for i in range(4) for j in range(4)) / 8
    assert measures.composition_error(r, s, t) == pytest.approx(written_out)
    truth, guess = normal(9, 2, seed=7), normal(9, 2, seed=8)
    error = sum((float(truth[i, k]) - float(guess[i, k])) ** 2 for i in n for k in (0, 1))
    means = [sum(float(truth[i, k]) for i in n) / 9 for k in (0, 1)]
    variance = sum((float(truth[i, k]) - means[k]) ** 2 for i in n for k in (0, 1))
    assert measures.r_squared(guess, truth) == pytest.approx(1 - error / variance)


def test_averages_are_those_of_the_resampled_images():
    values, pairs = normal(6), normal(6, 6, seed=1)
    weights = torch.tensor([[1.0] * 6, [2, 0, 1, 3, 0, 0]], dtype=torch.float64)
    drawn = [0, 0, 2, 3, 3, 3]
    assert measures.average(values, weights).tolist() == pytest.approx([values.mean().item(), values[drawn].mean().item()])
    distinct = [pairs[i, j].item() for i in drawn for j in drawn if i != j]
    counted = sum(distinct) / (len(distinct))
    assert measures.average(pairs, weights)[1].item() == pytest.approx(counted)
    away = [pairs[i, j].item() for i in range(6) for j in range(6) if i != j]
    assert measures.average(pairs, weights)[0].item() == pytest.approx(sum(away) / 30)


def test_what_chance_gives():
    """Unrelated unit vectors in d dimensions, N candidates."""
    n, d = 2000, 16
    z, z_a = unit(n, d, 1), unit(n, d, 2)
    one = torch.ones(1, n, dtype=torch.float64)
    assert measures.average(measures.invariance(z, z_a), one).item() == pytest.approx(2, abs=0.05)
    assert measures.average(measures.gram_deviation(z, z_a), one).item() == pytest.approx(2 / d, rel=0.03)
    ranks = measures.retrieval_ranks(z, z_a)
    assert (1 / ranks).mean().item() == pytest.approx(sum(1 / k for k in range(1, n + 1)) / n, rel=0.3)
    assert ranks.mean().item() == pytest.approx((n + 1) / 2, rel=0.05)
    assert measures.spread(z).mean().item() == pytest.approx(1, abs=0.02)
    assert measures.composition_error(rotation(64, 1), rotation(64, 2), rotation(64, 3)) == pytest.approx(1, abs=0.1)
    assert measures.effective_rank(z) == pytest.approx(d, rel=0.02)


def test_collapse_shows():
    same = unit(1, 8, 1).expand(50, 8)
    line = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None] * unit(1, 8, 1)
    assert measures.spread(same).mean() < 1e-20 and measures.effective_rank(line) == pytest.approx(1, abs=1e-6)
    assert (measures.retrieval_ranks(same, same) == 25.5).all()  # equals share the middle place: no perfect score for a point
    found = rotation_errors(same, [same])
    assert found["invariance_error"] < 1e-20 and math.isnan(found["rotation_invariance_ratio"])


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Terms with an effect of the draw and one of the image; the truth is 1."""
    inside = 0
    for seed in range(60):
        image, draw, noise = normal(80, seed=seed), 0.5 * normal(12, seed=1000 + seed), normal(12, 80, seed=2000 + seed)
        weights = measures.resamples(80, 200, augment.generator(seed)).double()
        rows = torch.stack([measures.average(1 + image + draw[k] + noise[k], weights) for k in range(12)])
        mean, low, high = measures.interval(rows, augment.generator(seed, "draws"))
        assert low < mean < high
        inside += low < 1 < high
    assert 51 <= inside <= 60

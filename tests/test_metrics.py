"""kNN and the rotation metrics, on embeddings where the answer is known."""

import math

import torch
import torch.nn.functional as F
from pytest import approx
from safetensors.torch import load_file

from care_hub import metrics
from care_hub.augment import seeded_generator
from care_hub.evaluate.equivariance import rotation_errors
from care_hub.metrics import knn_scores, knn_top1
from care_hub.rotation import procrustes


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(n, d, seed=0):
    return F.normalize(normal(n, d, seed=seed), dim=1)


def orthogonal(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def proper(d, seed=0):
    """An orthogonal matrix of determinant +1."""
    r = orthogonal(d, seed)
    r[0] *= torch.linalg.det(r).sign()
    return r


def square(v):
    return sum(float(x) ** 2 for x in v)


def dot(u, v):
    return sum(float(a) * float(b) for a, b in zip(u, v, strict=True))


def test_knn_votes_equal_the_public_code(shared):
    values = load_file(shared("reference/official_values.safetensors"))
    v = {k.removeprefix("knn."): t for k, t in values.items() if k.startswith("knn.")}
    scores = knn_scores(v["bank"], v["bank_labels"], v["query"], 10, k=200, temperature=0.5)
    torch.testing.assert_close(scores, v["scores"], rtol=1e-4, atol=1e-3)


def test_knn_on_clusters_and_on_noise():
    centers, labels = normal(5, 16), torch.arange(1000) % 5
    bank = centers[labels] + 0.1 * normal(1000, 16, seed=1)
    queries = centers[labels] + 0.1 * normal(1000, 16, seed=2)
    assert knn_top1(bank, labels, queries, labels) == 100
    assert 12 < knn_top1(normal(1000, 16), labels, normal(1000, 16, seed=3), labels) < 28
    assert knn_top1(bank[:10], labels[:10], queries, labels, k=1, temperature=0.1) == 100


def test_procrustes_recovers_a_rotation_and_special_ones_have_determinant_one():
    z, eye = normal(50, 6), torch.eye(6, dtype=torch.float64)
    mirrored = proper(6)
    mirrored[0] *= -1  # determinant -1
    torch.testing.assert_close(procrustes(z, z @ mirrored.T), mirrored)
    special = procrustes(z, z @ mirrored.T, special=True)
    assert torch.linalg.det(special) == approx(1) and torch.allclose(special @ special.T, eye)
    best = (z @ mirrored.T - z @ special.T).square().sum()
    for seed in range(20):
        assert (z @ mirrored.T - z @ proper(6, seed).T).square().sum() >= best
    many = procrustes(torch.stack([z, z]), torch.stack([z @ mirrored.T, z]))
    torch.testing.assert_close(many[1], eye)


def test_an_encoder_that_rotates_has_no_rotation_error():
    z = unit(200, 8)
    found = rotation_errors(z, [z @ orthogonal(8, seed).T for seed in (1, 2)])
    assert found["rotation_error"] < 1e-20 and found["rotation_invariance_ratio"] < 1e-20
    assert found["gram_deviation"] < 1e-20
    assert found["invariance_error"] > 0.5


def test_an_invariant_encoder_has_no_invariance_error():
    z = unit(200, 8)
    assert rotation_errors(z, [z])["invariance_error"] == 0


def test_an_encoder_that_forgets_everything_gains_nothing_by_rotating():
    """|a - b|^2 = 2 on average for independent unit vectors; a rotation fitted on others leaves about 2."""
    found = rotation_errors(unit(2000, 16), [unit(2000, 16, seed=1)])
    assert found["invariance_error"] == approx(2, abs=0.1)
    assert 0.9 < found["rotation_invariance_ratio"] < 1.1
    assert found["gram_deviation"] == approx(2 / 16, rel=0.1)  # two independent products of variance 1 / d


def test_invariance_residual_gram_deviation_and_gamma_equal_their_definition():
    z, z_a, r, n = unit(9, 4, 1), unit(9, 4, 2), orthogonal(4), range(9)
    invariance, residual = metrics.invariance(z, z_a), metrics.residual(z, z_a, r)
    gram, gamma = metrics.gram_deviation(z, z_a), metrics.relative_equivariance(z, z_a)
    for i in n:
        rotated = [dot(row, z[i]) for row in r]
        assert invariance[i].item() == approx(square(z_a[i] - z[i]))
        assert residual[i].item() == approx(square(a - b for a, b in zip(z_a[i], rotated, strict=True)))
        for j in n:
            assert gram[i, j].item() == approx((dot(z_a[i], z_a[j]) - dot(z[i], z[j])) ** 2, abs=1e-15)
            changed = (square(z_a[j] - z_a[i]) - square(z[j] - z[i])) ** 2
            moved = (square(z_a[j] - z[j]) + square(z_a[i] - z[i])) ** 2
            assert gamma[i, j].item() == approx(changed / moved, abs=1e-15)


def test_ranks_and_variance_equal_their_definition():
    z, z_a, n = unit(9, 4, 1), unit(9, 4, 2), range(9)
    cosines = [[dot(q, c) for c in z_a] for q in z]
    ranks = [1 + sum(cosines[i][j] > cosines[i][i] for j in n if j != i) for i in n]
    found = metrics.retrieval(z, z_a)
    assert found["mrr"].tolist() == approx([1 / rank for rank in ranks])
    for k in (1, 5):
        assert found[f"hit_at_{k}"].tolist() == [rank <= k for rank in ranks]
    center = [sum(float(v[k]) for v in z) / 9 for k in range(4)]
    assert metrics.variance(z).mean().item() == approx(1 - square(center))


def test_composition_error_and_r_squared_equal_their_definition():
    r, s, t, d = orthogonal(4), orthogonal(4, 5), orthogonal(4, 6), range(4)
    errors = ((float(r[i, j]) - dot(s[i], t[:, j])) ** 2 for i in d for j in d)
    assert metrics.composition_error(r, s, t) == approx(sum(errors) / 8)
    truth, guess = normal(9, 2, seed=7), normal(9, 2, seed=8)
    entries = [(i, k) for i in range(9) for k in (0, 1)]
    error = sum((float(truth[i, k]) - float(guess[i, k])) ** 2 for i, k in entries)
    means = [sum(float(truth[i, k]) for i in range(9)) / 9 for k in (0, 1)]
    total = sum((float(truth[i, k]) - means[k]) ** 2 for i, k in entries)
    assert metrics.r_squared(guess, truth) == approx(1 - error / total)


def test_weighted_means_are_those_of_the_resampled_images():
    values, pairs = normal(6), normal(6, 6, seed=1)
    weights = torch.tensor([[1.0] * 6, [2, 0, 1, 3, 0, 0]], dtype=torch.float64)
    sampled = [0, 0, 2, 3, 3, 3]
    expected = [values.mean().item(), values[sampled].mean().item()]
    assert metrics.weighted_mean(values, weights).tolist() == approx(expected)
    for row, images in enumerate((range(6), sampled)):
        distinct = [pairs[i, j].item() for i in images for j in images if i != j]
        assert metrics.weighted_mean(pairs, weights)[row].item() == approx(sum(distinct) / len(distinct))


def test_what_chance_gives():
    """Unrelated unit vectors in d dimensions, N candidates."""
    n, d = 2000, 16
    z, z_a = unit(n, d, 1), unit(n, d, 2)
    one = torch.ones(1, n, dtype=torch.float64)
    assert metrics.weighted_mean(metrics.invariance(z, z_a), one).item() == approx(2, abs=0.05)
    assert metrics.weighted_mean(metrics.gram_deviation(z, z_a), one).item() == approx(2 / d, rel=0.03)
    found, harmonic = metrics.retrieval(z, z_a), sum(1 / k for k in range(1, n + 1))
    assert found["mrr"].mean().item() == approx(harmonic / n, rel=0.3)
    assert found["hit_at_5"].mean().item() < 20 / n
    assert metrics.variance(z).mean().item() == approx(1, abs=0.02)
    unrelated = [orthogonal(64, seed) for seed in (1, 2, 3)]
    assert metrics.composition_error(*unrelated) == approx(1, abs=0.1)
    assert metrics.effective_rank(z) == approx(d, rel=0.02)


def test_collapse_shows():
    same = unit(1, 8, 1).expand(50, 8)
    line = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None] * unit(1, 8, 1)
    assert metrics.variance(same).mean() < 1e-20 and metrics.effective_rank(line) == approx(1, abs=1e-6)
    # Equals stand in random order: no perfect score for a point.
    for name, chance in (
        ("mrr", sum(1 / k for k in range(1, 51)) / 50),
        ("hit_at_1", 0.02),
        ("hit_at_5", 0.1),
    ):
        assert metrics.retrieval(same, same)[name].tolist() == approx([chance] * 50)
    found = rotation_errors(same, [same])
    assert found["invariance_error"] < 1e-20 and math.isnan(found["rotation_invariance_ratio"])


def test_one_augmentation_that_moves_next_to_nothing_ruins_no_ratio():
    """A mean of ratios would be that of rounding: 2,260 was seen where one blur had a sigma near 0."""
    z = unit(200, 8)
    nothing = torch.nn.functional.normalize(z + 1e-6 * normal(200, 8, seed=3), dim=1)
    little = torch.nn.functional.normalize(z + 1e-3 * normal(200, 8, seed=4), dim=1)
    rotated = z @ orthogonal(8, 1).T
    found = rotation_errors(z, [rotated, nothing, little])
    assert found["rotation_invariance_ratio"] < 1e-4 and found["motionless"] == approx(100 / 3)
    errors, motions = torch.tensor([[0.5], [1e-9], [0.1]]), torch.tensor([[1.0], [1e-12], [1.0]])
    assert metrics.ratio(errors, motions).item() == approx(0.3)
    low, mean, high = sorted(metrics.bootstrap_interval(errors.expand(3, 201), seeded_generator(0), motions))
    assert 0.1 <= low <= mean <= high <= 0.5
    nowhere = metrics.bootstrap_interval(errors.expand(3, 201), seeded_generator(0), 0 * motions)
    assert all(map(math.isnan, nowhere))


def test_intervals_contain_the_truth_about_as_often_as_they_say():
    """Terms with an effect of the augmentation and one of the image; the truth is 1."""
    inside = 0
    for seed in range(60):
        image, augmentation = normal(80, seed=seed), 0.5 * normal(12, seed=1000 + seed)
        terms = 1 + image + augmentation[:, None] + normal(12, 80, seed=2000 + seed)
        weights = metrics.bootstrap_weights(80, 200, seeded_generator(seed)).double()
        rows = torch.stack([metrics.weighted_mean(row, weights) for row in terms])
        mean, low, high = metrics.bootstrap_interval(rows, seeded_generator(seed, "draws"))
        assert low < mean < high
        inside += low < 1 < high
    assert 51 <= inside <= 60


def test_the_table_says_what_every_metric_is():
    for key, metric in metrics.METRICS.items():
        assert metric.key == key and metric.title and metric.meaning
        assert metric.better in ("", "higher", "lower")
    assert set(metrics.FINAL_METRICS) <= metrics.METRICS.keys()
    errors = rotation_errors(unit(8, 4), [unit(8, 4, seed=1)])
    assert errors.keys() <= metrics.METRICS.keys()

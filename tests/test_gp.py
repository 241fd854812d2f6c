"""The Gaussian process against scikit-learn's and against plain linear algebra."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.distance import pdist
from scipy.stats import multivariate_normal
from sklearn.decomposition import PCA
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern
from sklearn.preprocessing import StandardScaler

from sthisto.metrics import mse, pearson
from sthisto.models import Section
from sthisto.models._kernels import LEVEL, KernelAverage, _exact_spectrum, _Solution
from sthisto.models.gp import Gp
from sthisto.models.idw import Idw
from sthisto.models.ridge import Ridge

RUN = {"random_state": 0, "device": "cpu", "progress": False}


def section(random_state: int = 0, n: int = 60, name: str = "a", g: int = 12, noise: float = 0.3) -> Section:
    """Expression from features (the same map everywhere) and from a smooth field of positions (its own a section)."""
    rng = np.random.default_rng(random_state)
    shared = np.random.default_rng(99)
    xy, features = rng.uniform(0, 10, (n, 2)), rng.normal(size=(n, 6)).astype(np.float32)
    place = np.sin(xy @ rng.normal(0, 0.4, (2, 2)) + rng.uniform(0, 6, 2))
    factors = np.hstack([place, np.tanh(features[:, :2])])
    expression = 2 + factors @ shared.normal(size=(4, g)) + noise * rng.normal(size=(n, g))
    return Section(name=name, xy=xy, features=features, expression=expression.astype(np.float32))


def only(section: Section, rows) -> Section:
    return Section(
        name=section.name, xy=section.xy[rows], features=section.features[rows], expression=section.expression[rows]
    )


def one_kernel(weight: float) -> Gp:
    return Gp(n_factors=12, lengths=(3.0,), feature_lengths=(0.8,), feature_weights=(weight,), noises=(0.5,))


@pytest.mark.parametrize("by", ["positions", "features"])
def test_one_kernel_is_scikit_learns(by):
    train, test = section(), section(1)
    model = one_kernel(0.0 if by == "positions" else 1.0)
    model.fit([train], **RUN)
    scaler = StandardScaler().fit(train.features.astype(float))
    pca = PCA(6).fit(scaler.transform(train.features))
    x, there = (
        s.xy if by == "positions" else pca.transform(scaler.transform(s.features.astype(float))) for s in (train, test)
    )
    kernel = Matern(3.0, nu=1.5) if by == "positions" else RBF(0.8 * np.median(pdist(x)))
    mean = train.expression.mean(axis=0)
    reference = GaussianProcessRegressor(ConstantKernel(LEVEL) + kernel, alpha=0.5, optimizer=None)
    reference.fit(x, train.expression - mean)
    assert_allclose(model.predict(test), mean + reference.predict(there), rtol=1e-4, atol=1e-4)


def test_evidence_is_the_marginal_likelihood_at_its_best_scale():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(15, 15))
    kernel, scores = root @ root.T, rng.normal(size=(15, 2))
    average = KernelAverage(
        lengths=np.ones(1), feature_lengths=np.ones(1), feature_weights=(0.5,), noises=np.array([0.7]), power=1.0
    )
    k, basis, rotated = _exact_spectrum(kernel, scores, np.ones((15, 1)))
    solution = _Solution.of(average, k, basis, rotated, scores)
    evidence, solved = solution.evidence, basis @ (rotated * solution.inverse)
    held_out = solution.leave_one_out(kernel @ basis, scores)
    noisy = kernel + 0.7 * np.eye(15)
    s2 = np.einsum("nf,nm,mf->f", scores, np.linalg.inv(noisy), scores) / 15
    for f in range(2):
        expected = max(
            multivariate_normal(cov=s * noisy).logpdf(scores[:, f]) for s in s2[f] * np.array([0.9, 0.99, 1, 1.01, 1.1])
        )
        assert_allclose(evidence[f] - 7.5 * (1 + np.log(2 * np.pi)), expected)
    assert_allclose(solved, np.linalg.solve(noisy, scores))
    for i in range(15):
        rest = np.arange(15) != i
        expected = noisy[i, rest] @ np.linalg.solve(noisy[np.ix_(rest, rest)], scores[rest])
        assert_allclose(held_out[i], expected)


def test_kernels_are_averaged_by_tempered_evidence():
    train, test = section(), section(1)
    lengths = (1.0, 6.0)
    settings = {"n_factors": 1, "feature_lengths": (1.0,), "feature_weights": (0.2,), "noises": (0.5,)}
    singles = [Gp(lengths=(length,), **settings) for length in lengths]
    both = Gp(lengths=lengths, **settings)
    held_out = [model.fit([train], **RUN)[0] for model in singles]
    together = both.fit([train], **RUN)[0]
    parts = np.array([model.predict(test) for model in singles])
    share = (both.predict(test) - parts[1]) / (parts[0] - parts[1])
    assert_allclose(share, share[0, 0], rtol=5e-2)  # one share for one factor, at every point and gene
    assert 0 < share[0, 0] < 1
    sharper = Gp(lengths=lengths, power=5.0, **settings)
    sharper.fit([train], **RUN)
    best = parts[0] if share[0, 0] > 0.5 else parts[1]
    assert abs(sharper.predict(test) - best).max() < abs(both.predict(test) - best).max()
    low, high = np.minimum(*held_out), np.maximum(*held_out)
    assert ((together >= low - 1e-5) & (together <= high + 1e-5)).all()


def test_held_out_spots_are_as_if_conditioned_without_them():
    train = section(n=20)
    held_out = one_kernel(0.4).fit([train], **RUN)[0]
    # With as many factors as genes the reduction is a rotation, and one kernel for all makes it vanish.
    model = one_kernel(0.4)
    model.fit([train], **RUN)
    state = model.state()
    near = Matern(3.0, nu=1.5)(train.xy)
    alike = RBF(state["feature_lengths"][0])(state["inducing_features"])
    kernel = 0.6 * near + 0.4 * alike + LEVEL + 0.5 * np.eye(20)
    mean = train.expression.mean(axis=0)
    for i in range(20):
        rest = np.arange(20) != i
        solved = np.linalg.solve(kernel[np.ix_(rest, rest)], train.expression[rest] - mean)
        assert_allclose(held_out[i], mean + kernel[i, rest] @ solved, rtol=2e-4)


def test_pure_noise_is_predicted_no_better_than_by_its_mean():
    rng = np.random.default_rng(0)
    train = section(n=80)
    noise = rng.normal(size=(80, 200)).astype(np.float32)
    held_out = Gp().fit([Section(name="a", xy=train.xy, features=train.features, expression=noise)], **RUN)[0]
    ratio = mse(noise, held_out).mean() / noise.var(axis=0).mean()
    assert 0.99 < ratio < 1.1


def test_held_out_error_is_that_of_hidden_spots():
    everything = section(n=300, noise=1.0)
    train, hidden = only(everything, np.s_[:150]), only(everything, np.s_[150:])
    model = Gp()
    held_out = model.fit([train], **RUN)[0]
    ratio = mse(train.expression, held_out).mean() / mse(hidden.expression, model.predict(hidden)).mean()
    assert 0.85 < ratio < 1.15


def test_beats_the_plain_methods_where_positions_and_features_both_matter():
    everything = section(n=240, noise=0.5)
    train, hidden = only(everything, np.s_[:120]), only(everything, np.s_[120:])
    scores = {}
    for kind in (Gp, Ridge, Idw):
        model = kind()
        model.fit([train], **RUN)
        scores[kind] = pearson(hidden.expression, model.predict(hidden)).mean()
    assert scores[Gp] > max(scores[Ridge], scores[Idw]) + 0.05


def test_a_second_section_helps_and_positions_compare_within_a_section_only():
    a, b = section(0, n=300, name="a", noise=1.5), section(1, n=300, name="b", noise=1.5)
    few, hidden = only(a, np.s_[:25]), only(a, np.s_[25:])
    alone, together = Gp(), Gp()
    alone.fit([few], **RUN)
    together.fit([few, b], **RUN)
    r = [pearson(hidden.expression, model.predict(hidden)).mean() for model in (alone, together)]
    assert r[1] > r[0] + 0.02
    moved = Section(name="b", xy=b.xy + 100, features=b.features, expression=b.expression)
    again = Gp()
    again.fit([few, moved], **RUN)
    assert_allclose(again.predict(hidden), together.predict(hidden), atol=1e-4)


def test_a_section_that_was_not_fitted_is_predicted_from_its_features():
    a, new = section(0, n=200), section(3, n=200, name="new")
    model = Gp()
    model.fit([a], **RUN)
    predicted = model.predict(new)
    assert pearson(new.expression, predicted).mean() > 0.4
    elsewhere = Section(name="new", xy=new.xy * 7 - 3, features=new.features * 2 + 5)
    assert_allclose(model.predict(elsewhere), predicted, atol=1e-4)


def test_a_section_that_was_not_fitted_has_the_gene_means_if_its_features_are_those_of_training():
    a, b = section(0, n=80, name="a"), section(1, n=40, name="b")
    model = Gp()
    model.fit([a, b], **RUN)
    twins = [model.predict(Section(name="new", xy=s.xy, features=s.features)) for s in (a, b)]
    expected = np.concatenate([a.expression, b.expression]).mean(axis=0)
    assert_allclose(np.concatenate(twins).mean(axis=0), expected, rtol=1e-5)


def test_points_far_from_every_spot_are_predicted_from_their_features():
    model = Gp(feature_weights=(0.0,))
    train = section()
    model.fit([train], **RUN)
    extrapolated = Section(name="a", xy=train.xy + 1e4, features=train.features)
    predicted = model.predict(extrapolated)
    assert_allclose(predicted, np.tile(predicted[0], (60, 1)), rtol=1e-5)  # the section's level
    assert_allclose(predicted[0], train.expression.mean(axis=0), atol=0.8)


def test_order_of_points_and_of_spots_does_not_matter():
    train, test = section(), section(1, n=40)
    order = np.random.default_rng(0).permutation(40)
    model, other = Gp(), Gp()
    model.fit([train], **RUN)
    other.fit([only(train, np.random.default_rng(1).permutation(60))], **RUN)
    predicted = model.predict(test)
    assert_allclose(model.predict(only(test, order)), predicted[order], atol=1e-5)
    assert_allclose(other.predict(test), predicted, atol=1e-4)


def test_fits_without_variation_predict_the_mean():
    train = section()
    flat = Section(
        name="a", xy=train.xy, features=np.ones_like(train.features), expression=np.ones((60, 3), np.float32)
    )
    model = Gp()
    assert_allclose(model.fit([flat], **RUN)[0], 1, atol=1e-6)
    assert_allclose(model.predict(flat), 1, atol=1e-6)


def test_restored_state_predicts_the_same_bits():
    model, other = Gp(), Gp()
    model.fit([section(), section(1, name="b")], **RUN)
    state = model.state()
    assert all(value.dtype.kind in "iuf" for value in state.values())
    other.restore({key: value.copy() for key, value in state.items()})
    for name in ("b", "new"):
        assert_array_equal(other.predict(section(3, name=name)), model.predict(section(3, name=name)))


def test_what_is_missing_is_named():
    bare = Section(name="a", xy=np.zeros((30, 2)), expression=np.ones((30, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="'a' has no image features"):
        Gp().fit([bare], **RUN)

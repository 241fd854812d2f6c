"""Attention over measured spots: the exact solution by hand, its approximation, and several sections."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import cdist, pdist

from sthisto.models import Section
from sthisto.models._factors import Factors, normalized_variance, spot_variance
from sthisto.models._kernels import LEVEL, KernelValues, gauss, matern
from sthisto.models._standardize import SectionStandardizer
from sthisto.models.attention import Attention, SpotPool, _weighted

ONE = {"lengths": (3.0,), "feature_lengths": (1.0,), "feature_weights": (0.4,), "noises": (0.5,)}


def section(n: int = 80, random_state: int = 0, name: str = "a", g: int = 8, noise: float = 0.3) -> Section:
    """Genes that follow positions and features."""
    rng = np.random.default_rng(random_state)
    xy = rng.uniform(0, 9, (n, 2))
    features = rng.normal(size=(n, 6))
    truth = np.column_stack([np.sin(xy[:, 0] / 2), np.cos(xy[:, 1] / 3), features[:, :2]]) @ weights(g)
    expression = 3 + truth + noise * rng.normal(size=(n, g))
    return Section(name=name, xy=xy, features=features.astype(np.float32), expression=expression.astype(np.float32))


def weights(g: int) -> NDArray[np.float64]:
    return np.random.default_rng(99).normal(size=(4, g))


def fit(*sections: Section, random_state: int = 0, **params: object) -> tuple[Attention, list[NDArray[np.float32]]]:
    model = Attention(**params)  # type: ignore[arg-type]
    return model, model.fit(list(sections), random_state=random_state, device="cpu", progress=False)


def bare(spots: Section) -> Section:
    return Section(name=spots.name, xy=spots.xy, features=spots.features)


def by_hand(spots: Section, points: Section, n_factors: int) -> NDArray[np.float64]:
    """One kernel and one noise: z* = k (K + noise diag(v))^-1 z, as in any textbook on kriging."""
    y = spots.expression.astype(float) - spots.expression.mean(axis=0, dtype=float)
    mean, std = spots.features.mean(axis=0, dtype=float), spots.features.std(axis=0, dtype=float)
    standard, there = ((each.features - mean) / std for each in (spots, points))
    scale = np.median(pdist(standard))
    v = normalized_variance(spot_variance(spots.xy, lambda rows: y[rows]))
    factors = Factors.of(lambda rows: y[rows], v, np.ones(len(v)), n_factors)

    def kernel(a_xy, a_look):
        by_place = matern(cdist(a_xy, spots.xy) / 3.0)
        return 0.6 * by_place + 0.4 * gauss(cdist(a_look, standard) / scale) + LEVEL

    solved = np.linalg.solve(kernel(spots.xy, standard) + 0.5 * np.diag(v), factors.z)
    return spots.expression.mean(axis=0) + kernel(points.xy, there) @ solved @ (factors.shrinkage * factors.loadings)


def test_one_kernel_is_kriging_by_hand() -> None:
    spots, points = section(), bare(section(random_state=5))
    model, _ = fit(spots, n_factors=4, n_components=6, **ONE)
    np.testing.assert_allclose(model.predict(points), by_hand(spots, points, 4), atol=2e-4)


def test_held_out_factors_are_predictions_by_the_other_spots() -> None:
    """Leave-one-out by leverage against leaving out for real; the factors themselves are shared by both."""
    spots = section(n=40, noise=0.5)
    y = spots.expression.astype(float) - spots.expression.mean(axis=0, dtype=float)
    v = normalized_variance(spot_variance(spots.xy, lambda rows: y[rows]))
    factors = Factors.of(lambda rows: y[rows], v, np.ones(40), 3)
    _, held_out = fit(spots, n_factors=3, n_components=6, **ONE)
    standard = (spots.features - spots.features.mean(axis=0)) / spots.features.std(axis=0)
    k = 0.6 * matern(cdist(spots.xy, spots.xy) / 3) + 0.4 * gauss(
        cdist(standard, standard) / np.median(pdist(standard))
    )
    k = k + LEVEL
    left_out = np.empty_like(factors.z)
    for i in range(40):
        rest = np.delete(np.arange(40), i)
        left_out[i] = k[i, rest] @ np.linalg.solve(k[np.ix_(rest, rest)] + 0.5 * np.diag(v[rest]), factors.z[rest])
    expected = spots.expression.mean(axis=0) + factors.leave_one_out(y, left_out, 1 / 40)
    np.testing.assert_allclose(held_out[0], expected, atol=5e-3)


def test_fewer_inducing_points_come_near_the_exact_map() -> None:
    spots, points = section(n=300), bare(section(n=100, random_state=1))
    exact, few = fit(spots)[0].predict(points), fit(spots, n_inducing=150)[0].predict(points)
    assert not np.array_equal(exact, few)
    assert np.corrcoef(exact.ravel(), few.ravel())[0, 1] > 0.98


def test_follows_positions_and_features() -> None:
    spots, elsewhere = section(n=200), section(n=100, random_state=3)
    model, held_out = fit(spots)
    found = model.predict(bare(elsewhere))
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(found.T, elsewhere.expression.T, strict=True)]
    assert min(r) > 0.8
    assert np.isfinite(held_out[0]).all()


def test_far_from_all_spots_it_predicts_the_gene_means() -> None:
    spots = section()
    model, _ = fit(spots)
    extrapolated = Section(name="a", xy=np.full((1, 2), 1e6), features=np.full((1, 6), 1e6, dtype=np.float32))
    away = np.abs(model.predict(extrapolated)[0] - spots.expression.mean(axis=0))  # clipped features still count
    assert (away < 2 * spots.expression.std(axis=0)).all()


def test_restored_from_its_state_it_predicts_the_same() -> None:
    model, _ = fit(section(), section(random_state=1, name="b"))
    again = Attention()
    again.restore({name: array.copy() for name, array in model.state().items()})
    points = bare(section(random_state=2, name="b"))
    np.testing.assert_array_equal(again.predict(points), model.predict(points))


def test_a_state_that_lacks_arrays_is_refused() -> None:
    state = fit(section())[0].state()
    del state["loadings"]
    with pytest.raises(ValueError, match=r"no fit of Attention.*loadings missing. Fit again"):
        Attention().restore(state)


def test_a_second_section_of_the_same_tissue_helps_and_a_contrary_one_does_no_harm() -> None:
    few, whole = section(n=40, noise=1.5), section(n=300, random_state=4, name="b", noise=1.5)
    contrary = Section(
        name="c", xy=whole.xy, features=whole.features, expression=np.ascontiguousarray(whole.expression[:, ::-1])
    )
    points, truth = bare(section(n=200, random_state=9)), section(n=200, random_state=9, noise=0).expression

    def score(*sections: Section) -> float:
        found = fit(*sections)[0].predict(points)
        return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(found.T, truth.T, strict=True)]))

    alone = score(few)
    assert score(few, whole) > alone + 0.05
    assert score(few, contrary) > alone - 0.02


def test_a_few_measured_spots_are_better_than_none_and_than_alone() -> None:
    few, whole = section(n=10, noise=0.7), section(n=300, random_state=4, name="b", noise=0.7)
    points, truth = bare(section(n=200, random_state=9)), section(n=200, random_state=9, noise=0).expression

    def score(name: str, *sections: Section) -> float:
        found = fit(*sections)[0].predict(replace(points, name=name))
        return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(found.T, truth.T, strict=True)]))

    assert score("a", few, whole) > max(score("stained", whole), score("a", few)) + 0.1


def test_the_own_spots_weight_the_solution_that_uses_positions() -> None:
    """Two solutions that differ: the mix is the regression of the own spots on both, no further than either."""
    rng = np.random.default_rng(0)
    y, own = rng.normal(size=(30, 5)), np.arange(8)
    factors = Factors.of(lambda rows: y[rows], np.ones(30), np.ones(30), 2)
    values = [KernelValues(*rng.normal(size=(2, 3, 4, 2))) for _ in range(2)]
    wrong, truth = rng.normal(size=(8, 2)), factors.z[own]
    for share in (0.0, 0.3, 1.0):
        held_out = [truth + (1 - share) * wrong, truth - share * wrong]  # together right, at this share
        mixed, left_out = _weighted((values[0], held_out[0]), (values[1], held_out[1]), factors, own)
        np.testing.assert_allclose(left_out, truth, atol=1e-9)
        np.testing.assert_allclose(mixed.position, share * values[0].position + (1 - share) * values[1].position)


def test_similarity_is_estimated_pair_by_pair_and_dissimilar_sections_are_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    a, b, other = section(n=150), section(n=150, random_state=4, name="b"), section(n=150, random_state=5, name="c")
    contrary = replace(other, expression=np.ascontiguousarray(other.expression[:, ::-1]))
    model, _ = fit(a, b, contrary)
    similarity = model.state()["similarity"]
    np.testing.assert_array_equal(similarity, similarity.T)
    np.testing.assert_array_equal(np.diag(similarity), 1)
    assert similarity[0, 1] > 0.9
    assert (similarity[2, :2] < 0.1).all()
    assert [record.args[0] for record in caplog.records] == ["c"]
    caplog.clear()
    fit(a, b)
    assert not caplog.records


def test_nothing_is_borrowed_from_a_dissimilar_section() -> None:
    one, points = section(n=150), bare(section(n=80, random_state=7))
    other = section(n=150, random_state=5, name="c")
    contrary = replace(other, expression=np.ascontiguousarray(other.expression[:, ::-1]))
    alone = fit(one)[0].predict(points)
    away = {}
    for name, second in (("similar", other), ("contrary", contrary)):
        model, _ = fit(one, second)
        state = model.state()
        own = slice(*state["starts"][:2])
        assert (state["similarity"][0, 1] < 0.05) == (name == "contrary")
        assert set(state["inducing_section"][own]) == ({0, 1} if name == "similar" else {0})
        away[name] = np.abs(model.predict(points) - alone).mean()
    assert away["contrary"] < 0.5 * away["similar"]


def noise(shape: tuple[int, ...], random_state: int) -> NDArray[np.float32]:
    return np.random.default_rng(random_state).normal(size=shape).astype(np.float32)


def test_memory_grows_with_the_sections_and_not_with_their_pairs() -> None:
    sections = [section(n=60, random_state=each, name=str(each)) for each in range(12)]
    held = {}
    for s in (6, 12):
        model, held_out = fit(*sections[:s], n_inducing=40, n_borrowed_spots=30)
        starts = model.state()["starts"]
        assert np.diff(starts).max() <= 40
        assert len(held_out) == s  # and one solution more, for sections that were not fitted
        assert np.isfinite(np.concatenate(held_out)).all()
        held[s] = sum(array.nbytes for name, array in model.state().items() if name != "similarity")
    assert held[12] < 2.1 * held[6]


def test_borrowed_spots_are_balanced_between_sections() -> None:
    sections = [section(n=n, name=str(n), random_state=n) for n in (5, 50, 51)]
    pool = SpotPool(sections, SectionStandardizer.of(sections, with_features=True), np.random.default_rng(0))
    rows = pool.balanced(np.array([0, 1, 2]), 45)
    assert np.bincount(pool.section[rows]).tolist() == [5, 20, 20]
    np.testing.assert_array_equal(rows, np.unique(rows))
    assert set(pool.balanced(np.array([1, 2]), 10)) <= set(pool.balanced(np.array([1, 2]), 20))
    assert len(pool.balanced(np.array([], dtype=int), 10)) == 0
    assert set(pool.draw(1, 7)) <= set(range(5, 55))
    every = np.concatenate([each.expression - each.expression.mean(axis=0) for each in sections])
    np.testing.assert_allclose(pool.deviation(rows), every[rows], atol=1e-6)


def test_a_section_that_was_not_fitted_is_predicted_from_its_features() -> None:
    model, _ = fit(section(n=200))
    stained = section(n=100, random_state=8, name="other")
    found = model.predict(bare(stained))
    moved = Section(name="other", xy=stained.xy + 100, features=stained.features)
    np.testing.assert_array_equal(found, model.predict(moved))  # its positions do not count
    visible = stained.features[:, :2] @ weights(8)[2:]
    assert np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(found.T, visible.T, strict=True)]) > 0.6


@pytest.mark.parametrize("part", ["features", "expression"])
def test_what_is_missing_is_named(part: str) -> None:
    whole = section()
    lacking = Section(
        **{**{name: getattr(whole, name) for name in ("name", "xy", "features", "expression")}, part: None}
    )
    with pytest.raises(ValueError, match=part if part == "expression" else "image features"):
        fit(lacking)


def test_few_spots_borrow_the_gene_means_of_other_sections() -> None:
    """Means drawn as far as their error is of their spread; a single section keeps its own."""
    rng = np.random.default_rng(0)
    truth = rng.normal(3, 1, 400)
    parts = [(each, n) for each, n in (("a", 200), ("b", 200), ("c", 4))]
    shift = {name: rng.normal(scale=0.3, size=400) for name, _ in parts}
    sections = [
        Section(
            name=name, xy=np.zeros((n, 2)), expression=(truth + shift[name] + noise((n, 400), n)).astype(np.float32)
        )
        for name, n in parts
    ]
    plain = SectionStandardizer.of(sections, with_features=False)
    shrunk = plain.shrunk(sections)
    error = [[np.mean((each.mean_of(n) - truth - shift[n]) ** 2) for n in "abc"] for each in (plain, shrunk)]
    assert error[1][2] < 0.7 * error[0][2]
    np.testing.assert_allclose(error[1][:2], error[0][:2], rtol=0.2)
    one = SectionStandardizer.of(sections[:1], with_features=False)
    np.testing.assert_array_equal(one.shrunk(sections[:1]).gene_mean, one.gene_mean)


def test_a_stained_section_has_the_gene_means_on_average() -> None:
    spots = section(n=200)
    model, _ = fit(spots)
    stained = Section(name="new", xy=spots.xy, features=spots.features)
    away = model.predict(stained).mean(axis=0) - spots.expression.mean(axis=0)
    assert (np.abs(away) < 0.02 * spots.expression.std(axis=0)).all()

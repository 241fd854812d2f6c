"""Ridge against scikit-learn, and its closed-form leave-one-out against fitting again."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sthisto.metrics import pearson
from sthisto.models import Section
from sthisto.models.ridge import Ridge

RUN = {"random_state": 0, "device": "cpu", "progress": False}
LOADINGS = np.random.default_rng(99).normal(size=(8, 5))


def section(random_state: int = 0, n: int = 50, name: str = "a", noise: float = 1.0) -> Section:
    """Features on unlike scales; expression a linear map of them, the same for every section."""
    rng = np.random.default_rng(random_state)
    factors = rng.normal(size=(n, 8))
    expression = 3 + factors @ LOADINGS + noise * rng.normal(size=(n, 5))
    features = (factors * np.geomspace(0.1, 100, 8) + 20).astype(np.float32)
    return Section(name=name, xy=rng.uniform(0, 9, (n, 2)), features=features, expression=expression.astype(np.float32))


@pytest.mark.parametrize("components", [3, 256])
def test_predictions_are_those_of_the_scikit_learn_pipeline(components):
    train, test = section(), section(1)
    model = Ridge(n_components=components, alphas=(0.2,))
    model.fit([train], **RUN)
    pipeline = make_pipeline(StandardScaler(), PCA(min(components, 8)), SklearnRidge(alpha=0.2 * len(train)))
    pipeline.fit(train.features.astype(float), train.expression)
    assert_allclose(model.predict(test), pipeline.predict(test.features), rtol=1e-4, atol=1e-4)


def test_fewer_spots_than_features():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20, 60)).astype(np.float32)
    train = Section(name="a", xy=np.zeros((20, 2)), features=features, expression=rng.random((20, 3), dtype=np.float32))
    model = Ridge(alphas=(0.1,))
    model.fit([train], **RUN)
    pipeline = make_pipeline(StandardScaler(), SklearnRidge(alpha=2.0)).fit(features.astype(float), train.expression)
    assert_allclose(model.predict(train), pipeline.predict(features), rtol=1e-4, atol=1e-5)


def test_held_out_spots_are_as_if_fitted_without_them():
    train = section(n=25)
    held_out = Ridge(alphas=(0.3,)).fit([train], **RUN)[0]
    z = StandardScaler().fit_transform(train.features.astype(float))
    for i in range(len(train)):
        others = np.arange(len(train)) != i
        again = SklearnRidge(alpha=0.3 * len(train)).fit(z[others], train.expression[others])
        assert_allclose(held_out[i], again.predict(z[[i]])[0], rtol=1e-4)


def test_held_out_spots_of_several_sections_are_as_if_fitted_without_them():
    sections = [section(0, n=14, name="a"), section(1, n=9, name="b")]
    held_out = np.concatenate(Ridge(alphas=(0.3,)).fit(sections, **RUN))
    z = np.concatenate([StandardScaler().fit_transform(s.features.astype(float)) for s in sections])
    design = np.hstack([np.repeat(np.eye(2), [14, 9], axis=0), z])  # a free mean a section, a penalty on the rest
    penalty = np.diag([0.0, 0] + [0.3 * 23] * 8)
    y = np.concatenate([s.expression for s in sections]).astype(float)
    for i in range(len(y)):
        x, others = np.delete(design, i, axis=0), np.delete(y, i, axis=0)
        expected = design[i] @ np.linalg.solve(x.T @ x + penalty, x.T @ others)
        assert_allclose(held_out[i], expected, rtol=1e-4)


@pytest.mark.parametrize("noise", [0.1, 3.0, 30.0])
def test_the_penalty_is_the_one_scikit_learn_chooses(noise):
    train, test = section(n=30, noise=noise), section(1)
    alphas = tuple(10.0 ** np.arange(-3, 3))
    model = Ridge(alphas=alphas)
    model.fit([train], **RUN)
    z = StandardScaler().fit(train.features.astype(float))
    chosen = RidgeCV(alphas=30 * np.array(alphas)).fit(z.transform(train.features), train.expression)
    assert_allclose(model.predict(test), chosen.predict(z.transform(test.features)), rtol=1e-3, atol=1e-3)


def test_the_penalty_follows_the_noise():
    spread = []
    for noise in (0.1, 30.0):
        model = Ridge()
        model.fit([section(noise=noise)], **RUN)
        spread.append(np.linalg.norm(model.predict(section(1)).std(axis=0)) / np.hypot(np.linalg.norm(LOADINGS), noise))
    assert spread[1] < spread[0] / 5


def test_stain_does_not_matter_in_a_section_never_fitted():
    model = Ridge()
    model.fit([section()], **RUN)
    new = section(5, n=200, name="new")
    restained = Section(name="new", xy=new.xy, features=new.features * 3 - 7)
    assert_allclose(model.predict(restained), model.predict(new), atol=1e-3)
    assert (pearson(new.expression, model.predict(new)) > 0.8).all()


def test_gene_means_are_a_sections_own_or_the_mean_over_all_spots():
    a, b = section(0, n=30, name="a"), section(1, n=60, name="b")
    b = Section(name="b", xy=b.xy, features=b.features, expression=b.expression + 10)
    model = Ridge()
    model.fit([a, b], **RUN)
    for one in (a, b):
        assert_allclose(model.predict(one).mean(axis=0), one.expression.mean(axis=0), rtol=1e-4)
    new = section(2, name="new")
    pooled = np.concatenate([a.expression, b.expression]).mean(axis=0)
    assert_allclose(model.predict(new).mean(axis=0), pooled, rtol=1e-4)


def test_a_feature_that_is_constant_in_training_says_nothing():
    train, test = section(), section(1)
    constant = np.full((50, 1), 0.1, dtype=np.float32)
    constant[::2] = np.nextafter(constant[::2], np.float32(1))  # but for the last bit
    model, plain = Ridge(), Ridge()
    model.fit(
        [Section(name="a", xy=train.xy, features=np.hstack([train.features, constant]), expression=train.expression)],
        **RUN,
    )
    plain.fit([train], **RUN)
    surprising = np.hstack([test.features, constant + np.arange(50, dtype=np.float32)[:, None]])
    assert_allclose(model.predict(Section(name="a", xy=test.xy, features=surprising)), plain.predict(test), rtol=1e-5)


def test_many_points_in_chunks_are_the_points_one_by_one():
    model = Ridge()
    model.fit([section()], **RUN)
    many = section(3, n=5000)
    one = Section(name="a", xy=many.xy[[4321]], features=many.features[[4321]])
    assert_allclose(model.predict(many)[4321], model.predict(one)[0], rtol=1e-6)


def test_restored_state_predicts_the_same_bits():
    model, other = Ridge(), Ridge()
    model.fit([section(), section(1, name="b")], **RUN)
    state = model.state()
    assert all(value.dtype.kind in "iuf" for value in state.values())
    other.restore({key: value.copy() for key, value in state.items()})
    for name in ("b", "new"):
        assert_array_equal(other.predict(section(3, name=name)), model.predict(section(3, name=name)))


def test_what_is_missing_is_named():
    bare = Section(name="a", xy=np.zeros((30, 2)), expression=np.ones((30, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="'a' has no image features"):
        Ridge().fit([bare], **RUN)
    model = Ridge()
    model.fit([section()], **RUN)
    narrow = Section(name="a", xy=np.zeros((3, 2)), features=np.ones((3, 5), dtype=np.float32))
    with pytest.raises(ValueError, match="fitted on 8 features and section 'a' has 5"):
        model.predict(narrow)
    with pytest.raises(ValueError, match="must differ"):
        Ridge().fit([section(), section(1)], **RUN)

"""HisToSGE against its equations in numpy, and the laws that a model keeps."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import erf, softmax
from sklearn.neighbors import NearestNeighbors

from sthisto import _training
from sthisto.models import Section
from sthisto.models.histosge import N_CODES, WAVELENGTHS, HisToSGE, Network, _sequences

RUN = {"random_state": 0, "device": "cpu", "progress": False}
VARIANTS = ("paper", "scripts")
SMALL = {"epochs": 3, "n_context": 8, "heads": 2, "hidden": 16, "width": 12}


def spots(random_state: int = 0, n: int = 40, g: int = 4, d: int = 6, name: str = "a", **given) -> Section:
    rng = np.random.default_rng(random_state)
    features = rng.normal(size=(n, d)).astype(np.float32)
    expression = np.abs(features[:, :g] + 2).astype(np.float32)
    fields = {"xy": rng.uniform(0, 10, (n, 2)), "features": features, "expression": expression}
    return Section(name=name, **(fields | given))


def points(random_state: int = 1, m: int = 25, name: str = "a", **given) -> Section:
    return spots(random_state, m, name=name, **({"expression": None} | given))


def fitted(*sections: Section, **params) -> HisToSGE:
    model = HisToSGE(**(SMALL | params))
    model.fit(sections or [spots()], **RUN)
    return model


def normed(x, weights, name):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def token_by_hand(look, place, weights, scripts):
    if scripts:
        return look + weights["position.0.weight"][place[:, 0]] + weights["position.1.weight"][place[:, 1]]
    return linear(look, weights, "features") + linear(place, weights, "position.0")


def output_by_hand(token, context, weights, *, heads, scripts):
    """The equations of the module for one point (w,) and its context (k, w)."""
    seen = normed(np.vstack([token, context]), weights, "before_attention")
    q, k, v = (linear(seen, weights, name).reshape(-1, heads, 64) for name in ("query", "key", "value"))
    attended = [softmax(k[:, h] @ q[0, h] / np.sqrt(64)) @ v[:, h] for h in range(heads)]
    h = token + linear(np.concatenate(attended), weights, "out")
    inner = linear(normed(h, weights, "before_mlp"), weights, "mlp.0")
    u = h + linear(inner * (1 + erf(inner / np.sqrt(2))) / 2, weights, "mlp.2")
    last = linear(normed(np.maximum(linear(u, weights, "head.0"), 0), weights, "head.2"), weights, "head.3")
    return np.maximum(last, 0) if scripts else last


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_pass_by_hand(variant):
    scripts, rng = variant == "scripts", np.random.default_rng(0)
    with _training.seeded(0):
        network = Network(5, 3, scripts=scripts, width=7, heads=2, hidden=9, dropout=0.0)
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.4)
    weights = {name: value.numpy().astype(float) for name, value in network.state_dict().items()}
    looks = [rng.normal(size=(n, 5)).astype(np.float32) for n in (4, 6)]
    places = [rng.integers(0, 9, (n, 2)) if scripts else rng.normal(size=(n, 32)).astype(np.float32) for n in (4, 6)]
    context, counts = rng.integers(0, 6, (4, 3)), rng.random((4, 3)) < 0.6
    counts[0] = False
    own, offered = (token_by_hand(*each, weights, scripts) for each in zip(looks, places, strict=True))
    expected = [
        output_by_hand(own[i], offered[context[i, counts[i]]], weights, heads=2, scripts=scripts) for i in range(4)
    ]
    tokens = [
        network.tokens(torch.tensor(look), torch.tensor(place)) for look, place in zip(looks, places, strict=True)
    ]
    found = network(*tokens, torch.tensor(context), torch.tensor(counts)).detach()
    assert np.abs(expected).max() > 0.1
    assert_allclose(found, expected, atol=1e-5)


def test_positions_are_waves_from_the_middle_or_whole_pitches_from_the_corner():
    section = spots()
    paper, scripts = fitted(section), fitted(section, variant="scripts")
    there, where = np.array([[2.5, 7.25], [3.0, 1.0]]), np.array([0, -1])
    away = there[0] - section.xy.mean(axis=0)
    waves = [f(2 * np.pi * step / WAVELENGTHS) for step in away for f in (np.sin, np.cos)]
    assert_allclose(paper._position_codes(there, where), [np.concatenate(waves), np.zeros(32)], atol=1e-5)
    whole = np.round(there[0] - section.xy.min(axis=0))
    assert_array_equal(scripts._position_codes(there, where), [whole, [N_CODES, N_CODES]])
    assert not scripts._network.position[0].weight[N_CODES].any(), "no position adds nothing, after training, too"


def test_the_paper_attends_to_the_nearest_spots_of_the_section():
    a, b, there = spots(0), spots(3, name="b"), points()
    model = fitted(a, b)
    context, counts = model._context(there.xy, np.ones(25, dtype=int))
    expected = NearestNeighbors(n_neighbors=7).fit(b.xy).kneighbors(there.xy, return_distance=False) + len(a)
    assert counts.all()
    assert_array_equal(np.sort(context), np.sort(expected))
    pooled = np.concatenate([a.xy, b.xy])
    context, counts = model._context(pooled, np.repeat([0, 1], 40), hide_self=True)
    assert (counts.sum(axis=1) == 7).all()
    assert not (counts & (context == np.arange(80)[:, None])).any()
    assert ((context < 40) == (np.arange(80) < 40)[:, None])[counts].all()
    assert not model._context(there.xy, np.full(25, -1))[1].any(), "a section never fitted has no context"


def test_the_scripts_attend_in_table_order():
    a, b, there = spots(0, n=42), spots(3, n=20, name="b"), points()
    model = fitted(a, b, variant="scripts", n_context=20)
    sequences = [range(21), range(21, 42), range(42, 62)]
    xy = np.concatenate([a.xy, b.xy])
    context, counts = model._context(xy, np.repeat([0, 1], [42, 20]), hide_self=True)
    for i in range(62):
        own = next(sequence for sequence in sequences if i in sequence)
        assert sorted(context[i, counts[i]]) == [j for j in own if j != i]
    context, counts = model._context(there.xy, np.zeros(25, dtype=int))
    for i, p in enumerate(there.xy):
        nearest = np.hypot(*(a.xy - p).T).argmin()
        assert sorted(context[i, counts[i]]) == list(sequences[nearest // 21])


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(2, 80))
def test_sequences_are_even_and_keep_to_their_section(n_spots, length):
    sequence = _sequences(np.array(n_spots), length)
    sizes = np.bincount(sequence)
    section = np.repeat(np.arange(len(n_spots)), n_spots)
    assert (np.diff(sequence) >= 0).all()
    assert (sizes > 0).all()
    for s, n in enumerate(n_spots):
        own = np.unique(sequence[section == s])
        assert len(own) == max(1, round(n / length))
        assert np.ptp(sizes[own]) <= 1
        assert not np.isin(own, sequence[section != s]).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_seed_same_bits_and_the_state_is_all(variant):
    sections = [spots(), spots(1, name="β-2")]
    before = torch.get_rng_state()
    model, again, other = (HisToSGE(**SMALL, variant=variant) for _ in range(3))
    held_out = np.concatenate(model.fit(sections, **RUN))
    assert_array_equal(np.concatenate(again.fit(sections, **RUN)), held_out)
    assert_array_equal(torch.get_rng_state(), before)
    state = model.state()
    assert all(value.dtype.kind in "iuf" for value in state.values())
    other.restore({key: value.copy() for key, value in state.items()})
    for name in ("a", "β-2", "never fitted"):
        there = points(name=name)
        assert_array_equal(again.predict(there), model.predict(there))
        assert_array_equal(other.predict(there), model.predict(there))
    again.fit(sections, **(RUN | {"random_state": 1}))
    assert not np.array_equal(again.predict(there), model.predict(there))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["a", "never fitted"])
def test_a_point_does_not_depend_on_the_other_points(variant, name):
    model = fitted(variant=variant)
    there = points(name=name)
    if name != "a":  # features of a section never fitted are standardised among themselves
        there = Section(name=name, xy=there.xy, features=np.tile(there.features[:5], (5, 1)))
    whole = model.predict(there)
    for rows in (np.random.default_rng(0).permutation(25), np.arange(5, 10)):
        part = Section(name=name, xy=there.xy[rows], features=there.features[rows])
        assert_allclose(model.predict(part), whole[rows], atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_spots_can_be_learnt_by_heart(variant):
    section = spots(n=20)
    exact = {"learning_rate": 3e-3, "dropout": 0, "weight_decay": 0, "patience": None}
    model = HisToSGE(**(SMALL | {"epochs": 150, "hidden": 256} | exact), variant=variant)
    (held_out,) = model.fit([section], **RUN)
    learnt = np.isnan(held_out[:, 0])
    assert learnt.sum() == 17
    assert np.isfinite(held_out[~learnt]).all()
    error = ((model.predict(section) - section.expression)[learnt] ** 2).mean()
    assert error < 0.02 * section.expression[learnt].var()
    assert len(model.history["train"]) == len(model.history["validation"]) == 150
    assert_allclose(model.history["validation"][-1], ((held_out - section.expression)[~learnt] ** 2).mean(), rtol=1e-4)


def test_what_is_held_out_was_not_seen():
    section = spots()
    held_out = np.isfinite(HisToSGE(**SMALL, variant="scripts").fit([section], **RUN)[0][:, 0])
    changed = section.expression.copy()
    changed[held_out] += 5
    first, second = (
        HisToSGE(**SMALL, variant="scripts").fit([spots(expression=expression)], **RUN)[0]
        for expression in (section.expression, changed)
    )
    assert_array_equal(first, second)


def test_the_paper_stops_early_and_keeps_what_was_best():
    noise = np.random.default_rng(0).random((40, 4), dtype=np.float32)
    section = spots(expression=noise)
    model = HisToSGE(**(SMALL | {"epochs": 400, "learning_rate": 1e-2, "patience": 5}))
    (held_out,) = model.fit([section], **RUN)
    validation = model.history["validation"]
    assert len(validation) == validation.argmin() + 6 < 400
    out = np.isfinite(held_out[:, 0])
    assert_allclose(((held_out - noise)[out] ** 2).mean(), validation.min(), rtol=1e-4)


def painted(section: Section, shade) -> Section:
    """The section with pixels of one grey each."""
    grey = np.asarray(shade)
    return Section(
        **(
            vars(section)
            | {"patches": lambda rows: np.full((len(rows), 4, 4, 3), grey[rows, None, None, None], np.uint8)}
        )
    )


def test_color_is_read_where_pixels_are():
    rng = np.random.default_rng(0)
    shade = rng.integers(0, 256, 80)
    expression = np.tile(shade[:, None] / 50, 3).astype(np.float32)
    plain = spots(n=80, expression=expression, features=rng.normal(size=(80, 2)).astype(np.float32))
    settings = SMALL | {"epochs": 60, "hidden": 64, "learning_rate": 3e-3, "patience": None}
    model = HisToSGE(**settings)
    (held_out,) = model.fit([painted(plain, shade)], **RUN)
    out = np.isfinite(held_out[:, 0])
    assert np.corrcoef(held_out[out, 0], expression[out, 0])[0, 1] > 0.9
    (blind,) = HisToSGE(**settings).fit([plain], **RUN)
    assert np.corrcoef(blind[out, 0], expression[out, 0])[0, 1] < 0.6
    with pytest.raises(ValueError, match="'a' has no patches"):
        model.predict(plain)
    with pytest.raises(ValueError, match=r"only \['a'\] bring pixels"):
        model.fit([painted(plain, shade), spots(name="b")], **RUN)


@pytest.mark.parametrize("variant", VARIANTS)
def test_few_spots_and_no_points_and_many(variant):
    model = fitted(spots(n=3), variant=variant)
    assert np.isfinite(model.predict(points())).all()
    assert model.predict(points(m=0)).shape == (0, 4)
    many = points(m=2100)
    last = Section(name="a", xy=many.xy[-60:], features=many.features[-60:])
    assert_allclose(model.predict(many)[-60:], model.predict(last), atol=1e-5)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="variant is 'text'"):
        HisToSGE(variant="text")
    with pytest.raises(ValueError, match="n_context is 1"):
        HisToSGE(n_context=1)
    with pytest.raises(ValueError, match="no image features"):
        fitted(spots(features=None))
    with pytest.raises(ValueError, match="no measured expression"):
        fitted(points())
    with pytest.raises(ValueError, match="6 features and section 'a' has 5"):
        fitted().predict(points(d=5))

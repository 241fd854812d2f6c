"""Maps of labels: their positions, colors and agreement."""

import matplotlib as mpl

mpl.use("Agg")

from itertools import permutations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex, to_rgba
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.metrics import adjusted_rand_score

from sthisto import grids, pl
from sthisto.datasets import synthetic
from sthisto.pl._colors import MUTED, NONE, matched_colors, palette


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def adata():
    adata = synthetic(120, n_genes=10, rotation=20)
    adata.obs["region"] = adata.obs["region"].cat.remove_unused_categories()
    regions = adata.obs["region"].cat.codes.to_numpy()
    adata.obs["mine"] = pd.Series([str(9 - code) for code in regions], index=adata.obs_names)  # another order
    adata.obs["close"] = adata.obs["mine"].where(np.arange(120) % 5 > 0, "9")
    adata.obs["holes"] = adata.obs["region"].where(np.arange(120) % 4 > 0)
    return adata


def drawn(ax):
    [collection] = ax.collections
    return collection


def colors(ax):
    return [to_hex(each) for each in drawn(ax).get_facecolors()]


def named(ax):
    """Colors by the names in the legend."""
    legend = ax.get_legend()
    handles = legend.legend_handles
    return {text.get_text(): to_hex(h.get_facecolor()) for text, h in zip(legend.get_texts(), handles, strict=True)}


def laid(adata, factor=2):
    """Points of the refined lattice, with the labels of the spots nearest to them."""
    lattice = grids.Lattice.fit(adata.obsm["spatial"])
    fine = lattice.refine(factor)
    xy = fine.points(fine.cover(adata.obsm["spatial"], 1.1 * lattice.reach))
    rows = grids.nearest(xy, adata.obsm["spatial"])[1][:, 0]
    obs = adata.obs.iloc[rows].reset_index(drop=True).set_axis([str(i) for i in range(len(xy))])
    return ad.AnnData(np.zeros((len(xy), 1), np.float32), obs=obs, obsm={"spatial": xy})


def test_labels_are_filled_cells_where_the_spots_are(adata):
    [ax] = pl.domains(adata, "region", show=False)
    cells = drawn(ax)
    assert_allclose(cells.get_offsets(), adata.obsm["spatial"], atol=1e-6)
    assert len(cells.get_paths()[0].vertices) == 7  # a hexagon, closed
    codes = adata.obs["region"].cat.codes
    assert colors(ax) == [MUTED[code] for code in codes]
    assert named(ax) == dict(zip(adata.obs["region"].cat.categories, MUTED, strict=False))
    assert ax.get_title() == "region"


def test_print_jitter_leaves_no_gaps():
    square = synthetic(80, n_genes=10, array="square", rotation=5)
    sites = square.obsm["spatial"].copy()
    square.obsm["spatial"] = sites + np.random.default_rng(0).normal(0, 0.05 * 50, sites.shape)
    [ax] = pl.domains(square, "region", show=False)
    centers = drawn(ax).get_offsets()
    lattice = grids.Lattice.fit(square.obsm["spatial"])
    assert_allclose(centers, lattice.points(lattice.index(centers)), atol=1e-6)
    assert np.linalg.norm(centers - square.obsm["spatial"], axis=1).max() < 25  # half a pitch
    scattered = square[:40].copy()
    scattered.obsm["spatial"] = np.random.default_rng(0).uniform(0, 400, (40, 2))
    [ax] = pl.domains(scattered, "region", show=False)
    assert_array_equal(drawn(ax).get_offsets(), scattered.obsm["spatial"])


def test_domains_take_the_colors_of_the_reference_they_overlap(adata):
    reference, same, close = pl.domains(adata, ["mine", "close"], reference="region", show=False)
    assert colors(same) == colors(reference)
    regions = adata.obs["region"].cat.categories
    assert named(same) == {str(9 - i): MUTED[i] for i in range(len(regions))}
    assert named(close) == named(same)
    assert (reference.get_title(), same.get_title()) == ("region", "mine: ARI 1.00")
    expected = adjusted_rand_score(adata.obs["region"], adata.obs["close"])
    assert 0.3 < expected < 0.95
    assert close.get_title() == f"close: ARI {expected:.2f}"


def test_without_a_reference_nothing_is_scored_and_the_first_gives_the_colors(adata):
    first, second = pl.domains(adata, ["mine", "region"], show=False)
    assert (first.get_title(), second.get_title()) == ("mine", "region")
    assert colors(first) == colors(second)


def test_labels_that_overlap_nothing_have_colors_of_their_own(adata):
    more = adata.copy()
    more.obs["more"] = [f"{label}{i % 2}" for i, label in enumerate(more.obs["region"])]
    reference, panel = pl.domains(more, "more", reference="region", show=False)
    shown, known = named(panel), set(named(reference).values())
    assert len(set(shown.values())) == len(shown)
    assert len(known & set(shown.values())) == len(known)


def test_missing_labels_are_grey_and_do_not_count(adata):
    reference, mine = pl.domains(adata, "mine", reference="holes", show=False)
    missing = adata.obs["holes"].isna().to_numpy()
    assert {c for c, gone in zip(colors(reference), missing, strict=True) if gone} == {NONE}
    assert NONE not in {c for c, gone in zip(colors(reference), missing, strict=True) if not gone}
    assert named(reference)["no label"] == NONE
    assert "no label" not in named(mine)
    assert mine.get_title() == "mine: ARI 1.00"


def test_spots_have_the_label_of_the_nearest_dense_point(adata):
    dense = laid(adata)
    dense.obs["mine"] = dense.obs["mine"].map(lambda label: f"d{label}")
    reference, mine, points = pl.domains(adata, "mine", reference="region", dense=dense, show=False)
    assert len(drawn(points).get_offsets()) == dense.n_obs
    assert points.get_title() == "mine, dense: ARI 1.00"
    assert named(points) == {f"d{name}": color for name, color in named(mine).items()}
    assert set(colors(points)) == set(colors(reference))
    [alone] = pl.domains(dense, "region", show=False)
    assert len(drawn(alone).get_offsets()) == dense.n_obs


def test_colors_are_those_stored_by_scanpy_or_given(adata):
    kept = adata.copy()
    n = len(kept.obs["region"].cat.categories)
    kept.uns["region_colors"] = ["#%02x0000" % (20 * i + 20) for i in range(n)]
    kept.uns["mine_colors"] = ["red"] * n
    region, mine = pl.domains(kept, "mine", reference="region", show=False)
    assert list(named(region).values()) == kept.uns["region_colors"]
    assert set(named(mine).values()) == set(kept.uns["region_colors"])  # of the reference, not its own
    assert set(colors(pl.domains(kept, "mine", show=False)[0])) == {"#ff0000"}
    for wrong in (["red"], ["no color"] * n):  # as scanpy does
        kept.uns["region_colors"] = wrong
        assert set(colors(pl.domains(kept, "region", show=False)[0])) <= set(MUTED)
    names = dict.fromkeys(kept.obs["region"].cat.categories, "0.5")
    assert set(colors(pl.domains(kept, "region", palette=names, show=False)[0])) == {to_hex("0.5")}
    with pytest.raises(KeyError, match="palette= has no color for"):
        pl.domains(kept, "region", palette={"gland": "red"})
    with pytest.raises(ValueError, match="palette= has 1 colors for"):
        pl.domains(kept, "region", palette=["red"])


def test_labels_of_all_kinds(adata):
    kinds = adata.copy()
    number = np.arange(120) % 11
    kinds.obs["text"] = number.astype(str)
    kinds.obs["whole"] = number
    kinds.obs["float"] = np.where(number == 3, np.nan, number)
    kinds.obs["flag"] = number > 5
    assert list(named(pl.domains(kinds, "text", show=False)[0])) == [str(i) for i in range(11)]  # not 0, 1, 10, 2
    assert list(named(pl.domains(kinds, "whole", show=False)[0])) == [str(i) for i in range(11)]
    without = [str(i) for i in range(11) if i != 3]
    assert list(named(pl.domains(kinds, "float", show=False)[0])) == [*without, "no label"]
    assert list(named(pl.domains(kinds, "flag", show=False)[0])) == ["False", "True"]


def test_several_sections_share_their_colors():
    pair = synthetic(60, n_genes=10, n_sections=2)
    pair.obs["mine"] = pair.obs["region"].cat.codes.map(lambda code: f"m{code}")
    axes = pl.domains(pair, "mine", reference="region", library_key="library", image=True, show=False)
    assert len(axes) == 6
    assert [ax.get_ylabel() for ax in axes[1::3]] == ["synthetic_0", "synthetic_1"]
    every = {**named(axes[1]), **named(axes[4])}
    assert all(every[name] == color for ax in (axes[1], axes[4]) for name, color in named(ax).items())
    assert [ax.get_title() for ax in axes[2::3]] == ["mine: ARI 1.00"] * 2
    assert axes[0].images
    second = pair[pair.obs["library"] == "synthetic_1"]
    [one] = pl.domains(second, "mine", library_key="library", show=False)
    assert_allclose(drawn(one).get_offsets(), second.obsm["spatial"], atol=1e-6)


def test_invalid_input_is_refused_and_nothing_is_written(adata):
    before = adata.copy()
    with pytest.raises(KeyError, match=r"no column 'spatial_domain' in adata\.obs \(found: .*'mine'"):
        pl.domains(adata)
    with pytest.raises(KeyError, match=r"no column 'truth' in adata\.obs"):
        pl.domains(adata, "mine", reference="truth")
    with pytest.raises(KeyError, match=r"no column of \['mine'\] in dense\.obs"):
        pl.domains(adata, "mine", dense=ad.AnnData(np.zeros((5, 1)), obsm={"spatial": np.eye(5)[:, :2]}))
    wrong = adata.copy()
    wrong.obs["share"] = np.linspace(0, 1, 120)
    wrong.obs["none"] = pd.Categorical([np.nan] * 120)
    with pytest.raises(ValueError, match="numbers that are not whole"):
        pl.domains(wrong, "share")
    with pytest.raises(ValueError, match=r"adata\.obs\['none'\] has no label"):
        pl.domains(wrong, "none")
    with pytest.raises(ValueError, match="ax holds 1 axes; this figure has 2 panels"):
        pl.domains(adata, "mine", reference="region", ax=plt.gca())
    pl.domains(adata, "mine", reference="region", show=False)
    assert set(adata.uns) == set(before.uns)
    pd.testing.assert_frame_equal(adata.obs, before.obs)


@given(random_state=st.integers(0, 999), n=st.integers(1, 4), m=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_colors_are_matched_for_the_most_spots_in_all(random_state, n, m):
    rng = np.random.default_rng(random_state)
    codes, anchor = rng.integers(-1, n, 30), rng.integers(-1, m, 30)
    own = palette(m)
    found = matched_colors(codes, n, anchor, own)
    assert len(set(found)) == n

    def shared(colors_of_labels):
        """Spots that have one color in both panels."""
        both = (codes >= 0) & (anchor >= 0)
        return sum(colors_of_labels[a] == own[b] for a, b in zip(codes[both], anchor[both], strict=True))

    best = max(shared(order) for order in permutations([*own, *(f"none{i}" for i in range(n))], n))
    assert shared(found) == best


def test_a_palette_has_27_colors_and_then_repeats():
    assert len(set(palette(27))) == 27
    assert palette(30)[27:] == palette(3)
    assert NONE not in palette(27)
    grey = matched_colors(np.arange(30), 30, np.zeros(30, int), ["#000000"])
    assert len(grey) == 30
    assert all(0 <= channel <= 1 for color in palette(27) for channel in to_rgba(color))

"""What the pictures show, read back from their artists: places, sizes, colours and words."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import EllipseCollection, PolyCollection
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial import KDTree

from sthisto import pl
from sthisto.datasets import synthetic, synthetic_truth
from sthisto.pl._panels import _cell

DATA = Path(__file__).parents[2] / "shared" / "data"
GENES = ["region_00", "fine_01", "hidden_03"]


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def adata():
    return synthetic(60, n_genes=10, rotation=20)


@pytest.fixture(scope="module")
def dense(adata):
    return upsampled(adata, 3)


def steps_of(adata):
    """(2, 2) the array's two basis vectors, from the rows and columns."""
    number = np.column_stack([adata.obs[["array_row", "array_col"]], np.ones(adata.n_obs)])
    a_row, a_col, _ = np.linalg.lstsq(number, adata.obsm["spatial"], rcond=None)[0]
    hexagonal = (adata.obs[["array_row", "array_col"]].sum(axis=1) % 2 == 0).all()
    return np.array([2 * a_col, a_row + a_col]) if hexagonal else np.array([a_col, a_row])


def upsampled(adata, factor, library="synthetic_0"):
    """What upsample returns as far as pictures go, with the truth for a prediction."""
    basis = steps_of(adata) / factor
    xy = adata.obsm["spatial"]
    points = xy[len(xy) // 2] + (np.indices((200, 200)).reshape(2, -1).T - 100) @ basis
    points = points[KDTree(xy).query(points)[0] < np.hypot(*basis[0]) * factor * 0.6]
    dense = ad.AnnData(synthetic_truth(adata, points, library), var=adata.var, obsm={"spatial": points})
    dense.uns["spatial"] = {library: {"scalefactors": {"spot_diameter_fullres": np.hypot(*basis[0])}}}
    return dense


def drawn(ax):
    [collection] = ax.collections
    return collection


def test_spots_are_circles_of_their_true_diameter_where_they_are(adata):
    figure = pl.genes(adata, genes=GENES, return_fig=True)
    figure.canvas.draw()
    for gene, ax in zip(GENES, figure.axes, strict=False):
        spots = drawn(ax)
        assert isinstance(spots, EllipseCollection)
        assert_array_equal(spots.get_offsets(), adata.obsm["spatial"])
        assert_array_equal(spots.get_array(), adata[:, gene].X.toarray().ravel())
        radius = (spots.get_transform().get_matrix() @ spots.get_transforms()[0])[0, 0]  # on the screen
        across = ax.transData.transform([[0, 0], [27.5, 0]])  # 55 µm at 2 µm/px
        assert_allclose(2 * radius, across[1, 0] - across[0, 0])


def test_axes_are_those_of_the_image(adata, dense):
    for ax in pl.genes(adata, dense, GENES, show=False):
        left, right = ax.get_xlim()
        bottom, top = ax.get_ylim()
        assert left < right
        assert bottom > top  # y runs downwards
        assert (adata.obsm["spatial"] - 13.75 > [left, top]).all()
        assert (adata.obsm["spatial"] + 13.75 < [right, bottom]).all()
        assert ax.get_aspect() == 1
        assert len(ax.get_xticks()) == len(ax.get_yticks()) == 0


def test_both_panels_share_one_scale_and_the_highest_lies_where_the_data_have_it(adata, dense):
    axes = pl.genes(adata, dense, GENES, show=False)
    assert len(axes) == 6
    for i, gene in enumerate(GENES):
        measured, predicted = drawn(axes[2 * i]), drawn(axes[2 * i + 1])
        assert measured.norm is predicted.norm
        assert measured.get_cmap() == predicted.get_cmap()
        values = adata[:, gene].X.toarray().ravel(), dense[:, gene].X.ravel()
        assert_allclose(measured.norm.vmin, min(np.percentile(v, 1) for v in values), rtol=1e-6)
        assert_allclose(measured.norm.vmax, max(np.percentile(v, 99) for v in values), rtol=1e-6)
        spot = measured.get_offsets()[np.argmax(measured.get_array())]
        assert_array_equal(spot, adata.obsm["spatial"][np.argmax(values[0])])
        point = predicted.get_paths()[np.argmax(predicted.get_array())]
        assert_allclose(point.vertices[:-1].mean(0), dense.obsm["spatial"][np.argmax(values[1])])


def test_limits_can_be_set_and_a_flat_gene_has_a_scale(adata):
    [ax] = pl.genes(adata, genes="region_00", vmin=1, vmax="p50", show=False)
    assert drawn(ax).norm.vmin == 1
    assert_allclose(drawn(ax).norm.vmax, np.median(adata[:, "region_00"].X.toarray()), rtol=1e-6)
    flat = adata.copy()
    flat.X = np.full(adata.shape, 2.0, np.float32)
    [ax] = pl.genes(flat, genes="region_00", show=False)
    assert (drawn(ax).norm.vmin, drawn(ax).norm.vmax) == (2, 3)


@pytest.mark.parametrize(("array", "n_corners"), [("hexagonal", 6), ("square", 4)])
def test_points_are_the_cells_of_their_lattice(array, n_corners):
    adata = synthetic(60, n_genes=10, array=array, rotation=20)
    dense = upsampled(adata, 3)
    cells = drawn(pl.genes(adata, dense, "region_00", show=False)[1])
    assert isinstance(cells, PolyCollection)
    corners = np.array([path.vertices[:-1] for path in cells.get_paths()])  # (n, k, 2)
    assert len(corners) == dense.n_obs
    assert_allclose(corners.mean(1), dense.obsm["spatial"])
    x, y = np.moveaxis(corners, 2, 0)
    area = np.abs((x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(1)) / 2
    assert_allclose(area, np.abs(np.linalg.det(steps_of(adata) / 3)), rtol=1e-5)
    sides = np.hypot(*(corners[0] - np.roll(corners[0], 1, 0)).T)
    assert (sides > 0.01 * sides.max()).sum() == n_corners


@given(angle=st.floats(0, 90), skew=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_cell_holds_what_is_nearest_to_its_point(angle, skew, seed):
    turn = np.exp(1j * np.deg2rad(angle))
    second = turn * (skew + 1j * np.sqrt(1 - skew**2))
    basis = 7 * np.array([[turn.real, turn.imag], [second.real, second.imag]])
    cell = mpl.path.Path(_cell(basis))
    places = np.random.default_rng(seed).uniform(-10, 10, (200, 2))
    lattice = (np.indices((9, 9)).reshape(2, -1).T - 4) @ basis
    distance = np.linalg.norm(places[:, None] - lattice, axis=2)
    own = distance[:, 40]
    others = np.delete(distance, 40, axis=1).min(1)
    clear = np.abs(own - others) > 1e-6
    assert_array_equal(cell.contains_points(places)[clear], (own < others)[clear])


def test_points_without_a_lattice_are_squares_of_their_spacing(adata):
    points = np.random.default_rng(0).uniform(100, 400, (80, 2))
    dense = ad.AnnData(synthetic_truth(adata, points), var=adata.var, obsm={"spatial": points})
    corners = np.array(
        [path.vertices[:-1] for path in drawn(pl.genes(adata, dense, "fine_01", show=False)[1]).get_paths()]
    )
    spacing = np.median(KDTree(points).query(points, k=2)[0][:, 1])
    assert corners.shape == (80, 4, 2)
    assert_allclose(np.ptp(corners, axis=1), spacing)
    assert_allclose(corners.mean(1), points)


def test_the_picture_lies_under_the_spots_in_full_resolution_pixels(adata):
    picture = adata.uns["spatial"]["synthetic_0"]["images"]["hires"]
    height, width, _ = picture.shape
    [ax] = pl.genes(adata, genes="fine_01", show=False)
    [image] = ax.images
    assert image.get_extent() == [0, width, height, 0]
    small = adata.copy()
    entry = small.uns["spatial"]["synthetic_0"]
    entry["images"] = {"hires": np.zeros((8, 8, 3), np.uint8), "lowres": picture[::4, ::4]}  # as a broken file has it
    entry["scalefactors"]["tissue_lowres_scalef"] = 0.25
    [ax] = pl.genes(small, genes="fine_01", show=False)
    assert_allclose(ax.images[0].get_extent(), [0, width, height, 0], atol=4)
    assert_array_equal(ax.images[0].get_array(), picture[::4, ::4])
    large = adata.copy()
    large.uns["spatial"]["synthetic_0"] = {
        "images": {"hires": picture.repeat(4, axis=0).repeat(4, axis=1)},
        "scalefactors": {"tissue_hires_scalef": 4.0},
    }
    [ax] = pl.genes(large, genes="fine_01", show=False)
    assert max(ax.images[0].get_array().shape) <= 1000  # more would be slow and not seen
    assert_allclose(ax.images[0].get_extent(), [0, width, height, 0], atol=1)


def test_without_a_picture_the_genes_are_drawn_all_the_same(adata):
    assert not pl.genes(adata, genes="fine_01", image=False, show=False)[0].images
    bare = ad.AnnData(adata.X, obs=adata.obs, var=adata.var, obsm={"spatial": adata.obsm["spatial"]})
    [ax] = pl.genes(bare, genes="fine_01", show=False)
    assert not ax.images
    assert ax.get_aspect() == 1
    assert_allclose(drawn(ax).get_widths(), 27.5, rtol=1e-3)  # 0.55 of the pitch where nothing is said
    assert not [artist for artist in ax.artists if isinstance(artist, AnchoredSizeBar)]


def test_the_scale_bar_is_as_long_as_it_says(adata, dense):
    def bar(*args, **options):
        axes = pl.genes(*args, show=False, **options)
        assert not any(isinstance(artist, AnchoredSizeBar) for ax in axes[1:] for artist in ax.artists)
        bars = [artist for artist in axes[0].artists if isinstance(artist, AnchoredSizeBar)]
        return axes[0], bars[0] if bars else None

    ax, found = bar(adata, dense, GENES)
    [line] = found.size_bar.get_children()
    um, unit = found.txt_label.get_text().split()
    assert unit == "µm"
    assert_allclose(line.get_width() * 2.0, float(um))  # 2 µm/px
    assert line.get_width() <= np.ptp(ax.get_xlim()) / 3
    assert bar(adata, genes="fine_01", scale_bar=False)[1] is None
    measured = adata.copy()
    del measured.uns["spatial"]["synthetic_0"]["scalefactors"]["microns_per_pixel"]
    assert bar(measured, genes="fine_01")[1] is None
    measured.uns["sthisto"] = {
        "features": {"X": {"libraries": np.array(["b", "synthetic_0"]), "mpp": np.array([1.0, 20.0])}}
    }
    _, found = bar(measured, genes="fine_01")
    [line] = found.size_bar.get_children()
    mm, unit = found.txt_label.get_text().split()
    assert unit == "mm"
    assert_allclose(line.get_width() * 20.0, 1000 * float(mm))


def test_words(adata, dense):
    named = adata.copy()
    named.var["symbol"] = ["PCP4", np.nan, *adata.var_names[2:]]
    named.layers["sthisto"] = named.X * 2
    figure = pl.genes(named, dense, ["region_00", "fine_01"], layer="sthisto", return_fig=True)
    panels, bars = figure.axes[:4], figure.axes[4:]
    assert [ax.get_title() for ax in panels] == ["PCP4 (region_00)"] * 2 + ["fine_01"] * 2
    assert [ax.get_xlabel() for ax in panels] == ["sthisto", "predicted"] * 2
    assert [ax.get_ylabel() for ax in bars] == ["expression"] * 2
    assert_allclose(drawn(panels[0]).get_array(), 2 * adata[:, "region_00"].X.toarray().ravel())
    assert pl.genes(adata, genes="fine_01", show=False)[0].get_xlabel() == "measured"


def test_columns(adata, dense):
    def places(axes):
        return [(ax.get_subplotspec().rowspan.start, ax.get_subplotspec().colspan.start) for ax in axes]

    four = list(adata.var_names[:4])
    assert places(pl.genes(adata, genes=four, show=False)) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert places(pl.genes(adata, dense, four[:2], show=False)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert places(pl.genes(adata, dense, four[:2], ncols=2, show=False)) == [(0, i) for i in range(4)]


def test_one_section_of_several():
    pair = synthetic(40, n_genes=10, n_sections=2)
    second = pair[pair.obs["library"] == "synthetic_1"]
    [ax] = pl.genes(pair, genes="fine_01", library="synthetic_1", library_key="library", show=False)
    assert_array_equal(drawn(ax).get_offsets(), second.obsm["spatial"])
    height, width, _ = pair.uns["spatial"]["synthetic_1"]["images"]["hires"].shape
    assert ax.images[0].get_extent() == [0, width, height, 0]
    dense = upsampled(second.copy(), 2, "synthetic_1")
    dense.obs["library"] = "synthetic_1"
    axes = pl.genes(pair, dense, "fine_01", library="synthetic_1", library_key="library", show=False)
    assert len(drawn(axes[1]).get_paths()) == dense.n_obs
    with pytest.raises(ValueError, match="say with library= which to draw"):
        pl.genes(pair, genes="fine_01", library_key="library", show=False)
    with pytest.raises(KeyError, match="no section 'third'"):
        pl.genes(pair, genes="fine_01", library="third", library_key="library", show=False)


def test_the_objects_are_left_alone(adata, dense):
    before = adata.copy(), dense.copy()
    pl.genes(adata, dense, GENES, show=False)
    for now, then in zip((adata, dense), before, strict=True):
        assert set(now.uns) == set(then.uns)
        assert_array_equal(now.obsm["spatial"], then.obsm["spatial"])
        assert_array_equal(np.asarray(now.X.sum()), np.asarray(then.X.sum()))


def test_what_cannot_be_drawn_is_refused(adata, dense):
    with pytest.raises(ValueError, match="no gene to draw"):
        pl.genes(adata)
    with pytest.raises(KeyError, match=r"\['region_0'\] are not in adata.*such as .*'region_00'"):
        pl.genes(adata, genes=["region_0", "fine_01"])
    with pytest.raises(KeyError, match=r"\['fine_01'\] are not in dense"):
        pl.genes(adata, dense[:, ["region_00"]].copy(), "fine_01")
    with pytest.raises(KeyError, match=r"no layer 'sthisto' in adata.layers \(found: \['counts'\]"):
        pl.genes(adata, genes="fine_01", layer="sthisto")
    with pytest.raises(ValueError, match="'max' is no limit"):
        pl.genes(adata, genes="fine_01", vmax="max")
    with pytest.raises(ValueError, match="'p101' is no limit"):
        pl.genes(adata, genes="fine_01", vmax="p101")
    denoised = adata.copy()
    denoised.layers["sthisto"] = np.full(adata.shape, np.nan, np.float32)
    with pytest.raises(ValueError, match=r"\['fine_01'\] have no values"):
        pl.genes(denoised, genes="fine_01", layer="sthisto")


@pytest.mark.parametrize(
    ("interactive", "show", "shown"), [(True, None, 1), (False, None, 0), (False, True, 1), (True, False, 0)]
)
def test_show_save_and_return(adata, tmp_path, monkeypatch, interactive, show, shown):
    calls = []
    monkeypatch.setattr(plt, "isinteractive", lambda: interactive)
    monkeypatch.setattr(plt, "show", lambda: calls.append(1))
    result = pl.genes(adata, genes="fine_01", show=show, save=tmp_path / "picture.png")
    assert len(calls) == shown
    assert (result is None) == bool(shown)
    assert plt.imread(tmp_path / "picture.png").std() > 0
    assert isinstance(pl.genes(adata, genes="fine_01", return_fig=True), plt.Figure)


def test_a_visium_section():
    path = DATA / "dlpfc" / "151673.h5ad"
    if not path.exists():
        pytest.skip("the DLPFC section is not here")
    adata = ad.read_h5ad(path)
    [ax] = pl.genes(adata, genes="ENSG00000183036", show=False)
    assert len(drawn(ax).get_offsets()) == adata.n_obs
    assert_allclose(drawn(ax).get_widths(), 96.4, rtol=1e-3)
    _, width, height, _ = ax.images[0].get_extent()
    assert_allclose([width, height], 600 / 0.045004502)
    assert (adata.obsm["spatial"] < [width, height]).all()


def fitted(**curves):
    adata = ad.AnnData(np.zeros((3, 2), np.float32))
    adata.uns["sthisto"] = {"fit": {"mine": {"model": "attention", "history": curves}}}
    return adata


def test_history_draws_every_curve():
    train, validation = np.array([3.0, 2, 1]), np.array([3.0, 2.5, np.nan])
    [ax] = pl.history(fitted(train=train, validation=validation), "mine", show=False)
    for line, curve in zip(ax.lines, (train, validation), strict=True):
        assert_array_equal(line.get_xdata(), [1, 2, 3])
        assert_array_equal(line.get_ydata(), curve)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train", "validation"]
    assert len({line.get_color() for line in ax.lines}) == 2
    assert (ax.get_xlabel(), ax.get_title()) == ("epoch", "attention")


def test_history_draws_into_given_axes():
    figure, (left, right) = plt.subplots(1, 2)
    assert pl.history(fitted(train=np.array([1.0])), "mine", ax=right, show=False) == [right]
    assert pl.history(fitted(train=np.array([1.0])), "mine", ax=right, return_fig=True) is figure
    assert not left.lines
    assert right.lines[0].get_marker() == "."  # one epoch is no line


def test_history_of_what_has_none_is_refused():
    with pytest.raises(KeyError, match=r"no fitted model 'sthisto' \(found: \['mine'\]\): run sthisto.tl.fit"):
        pl.history(fitted(train=np.ones(3)))
    with pytest.raises(KeyError, match=r"found: \[\]"):
        pl.history(ad.AnnData(np.zeros((3, 2), np.float32)))
    with pytest.raises(ValueError, match="'attention' is fitted in one step"):
        pl.history(fitted(), "mine")


def scores(**models):
    """A table as evaluate gives it: two splits, repeats and genes, with values by model."""
    rows = [
        (model, split, repeat, gene, value + 0.1 * (split == "block") + 0.01 * repeat + 0.001 * number)
        for model, value in models.items()
        for split in ("random", "block")
        for repeat in range(3)
        for number, gene in enumerate(["A", "B", np.nan])
    ]
    return pd.DataFrame(rows, columns=["model", "split", "repeat", "gene", "value"]).assign(metric="pearson")


def test_evaluation_draws_means_repeats_and_the_ceiling():
    table = scores(attention=0.5, idw=0.3, ceiling=0.8).assign(library="s")
    random, block, genes = pl.evaluation(table, show=False)
    for ax, level in ((random, 0.002), (block, 0.102)):
        assert [text.get_text() for text in ax.get_xticklabels()] == ["attention", "idw"]
        assert_allclose([bar.get_height() for bar in ax.patches[:2]], [0.51 + level, 0.31 + level])
        points = np.concatenate([each.get_offsets() for each in ax.collections])
        expected = np.add.outer([0.5, 0.3], [0, 0.01, 0.02]).ravel() + level
        assert_allclose(points[:, 1], expected)
        assert_allclose(ax.lines[0].get_ydata(), 0.81 + level)
        assert "noise ceiling" in [text.get_text() for text in ax.texts]
    assert random.get_ylim() == block.get_ylim()
    assert random.get_ylim()[1] > 0.93
    assert (random.get_title(), block.get_title()) == ("random", "block")
    [cloud] = genes.collections
    assert_allclose(cloud.get_offsets(), [[0.51, 0.31], [0.511, 0.311]])
    assert (genes.get_xlabel(), genes.get_ylabel()) == ("attention", "idw")
    assert_allclose(*genes.lines[0].get_data())


def test_evaluation_draws_the_pair_asked_for_and_none_of_one_model(tmp_path):
    table = scores(attention=0.5, gp=0.4, idw=0.3)
    axes = pl.evaluation(table, genes=("idw", "gp"), save=tmp_path / "picture.png", show=False)
    assert (axes[-1].get_xlabel(), axes[-1].get_ylabel()) == ("idw", "gp")
    assert plt.imread(tmp_path / "picture.png").std() > 0
    alone = pl.evaluation(table[table["model"] == "gp"], show=False)
    assert [ax.get_title() for ax in alone] == ["random", "block"]
    assert isinstance(pl.evaluation(table, return_fig=True), plt.Figure)


def test_evaluation_of_what_is_not_there_is_refused():
    table = scores(attention=0.5, idw=0.3)
    with pytest.raises(KeyError, match=r"no metric 'mse' in the table \(there are: pearson\)"):
        pl.evaluation(table, "mse")
    with pytest.raises(KeyError, match=r"models \['gp'\] are not in the table \(there are: attention, idw\)"):
        pl.evaluation(table, genes=("gp", "idw"))
    with pytest.raises(ValueError, match="name two models, of attention, idw"):
        pl.evaluation(table, genes=("idw", "idw"))
    with pytest.raises(KeyError, match="no scores gene by gene"):
        pl.evaluation(table[table["gene"].isna()])

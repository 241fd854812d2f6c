"""Maps of genes, read back from their artists: positions, sizes, colors and text."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import EllipseCollection, PathCollection
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial import KDTree

from sthisto import grids, pl
from sthisto.datasets import synthetic, synthetic_truth
from sthisto.pl._colors import MIN_RANGE, WARNING

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
    """Return the only collection in axes."""
    [collection] = ax.collections
    return collection


def corners_of(cells):
    """(n, k, 2) corners of drawn cells in pixels of the section."""
    assert isinstance(cells, PathCollection)
    [outline] = cells.get_paths()
    return cells.get_offsets()[:, None] + outline.vertices[:-1]


def test_spots_are_circles_of_their_true_diameter_where_they_are(adata):
    figure = pl.genes(adata, GENES, return_fig=True)
    figure.canvas.draw()
    for gene, ax in zip(GENES, figure.axes, strict=False):
        spots = drawn(ax)
        assert isinstance(spots, EllipseCollection)
        assert_array_equal(spots.get_offsets(), adata.obsm["spatial"])
        assert_array_equal(spots.get_array(), adata[:, gene].X.toarray().ravel())
        radius = (spots.get_transform().get_matrix() @ spots.get_transforms()[0])[0, 0]  # on the screen
        across = ax.transData.transform([[0, 0], [27.5, 0]])  # 55 µm at 2 µm/px
        assert_allclose(2 * radius, across[1, 0] - across[0, 0])


@pytest.mark.parametrize(("across", "filled"), [(41, False), (42, True)])
def test_spots_of_large_arrays_are_drawn_as_cells(across, filled):
    xy = 10.0 * np.indices((3, across)).reshape(2, -1)[::-1].T
    spots = ad.AnnData(np.arange(len(xy), dtype=np.float32)[:, None], obsm={"spatial": xy})
    spots.var_names = ["gene"]
    [ax] = pl.genes(spots, "gene", show=False)
    if filled:
        assert_allclose(np.ptp(corners_of(drawn(ax)), axis=1), 10)
    else:
        assert_allclose(drawn(ax).get_widths(), 5.5)


def test_axes_are_those_of_the_image(adata, dense):
    for ax in pl.genes(adata, GENES, dense=dense, show=False):
        left, right = ax.get_xlim()
        bottom, top = ax.get_ylim()
        assert left < right
        assert bottom > top  # y runs downwards
        assert (adata.obsm["spatial"] - 13.75 > [left, top]).all()
        assert (adata.obsm["spatial"] + 13.75 < [right, bottom]).all()
        assert ax.get_aspect() == 1
        assert len(ax.get_xticks()) == len(ax.get_yticks()) == 0


def test_both_panels_share_one_scale_and_the_highest_value_is_where_the_data_have_it(adata, dense):
    axes = pl.genes(adata, GENES, dense=dense, show=False)
    assert len(axes) == 6
    for i, gene in enumerate(GENES):
        measured, predicted = drawn(axes[2 * i]), drawn(axes[2 * i + 1])
        assert measured.norm is predicted.norm
        assert measured.get_cmap() == predicted.get_cmap()
        values = adata[:, gene].X.toarray().ravel(), dense[:, gene].X.ravel()
        assert_allclose(measured.norm.vmin, min(np.percentile(v, 1) for v in values), rtol=1e-6)
        assert_allclose(measured.norm.vmax, max(np.percentile(v[v > 0], 99) for v in values), rtol=1e-6)
        spot = measured.get_offsets()[np.argmax(measured.get_array())]
        assert_array_equal(spot, adata.obsm["spatial"][np.argmax(values[0])])
        point = corners_of(predicted)[np.argmax(predicted.get_array())]
        assert_allclose(point.mean(0), dense.obsm["spatial"][np.argmax(values[1])])


def test_limits_can_be_set_and_a_flat_gene_has_a_scale(adata):
    [ax] = pl.genes(adata, "region_00", vmin=1, vmax="p50", show=False)
    assert drawn(ax).norm.vmin == 1
    assert_allclose(drawn(ax).norm.vmax, np.median(adata[:, "region_00"].X.toarray()), rtol=1e-6)
    flat = adata.copy()
    flat.X = np.full(adata.shape, 2.0, np.float32)
    [ax] = pl.genes(flat, "region_00", show=False)
    assert_allclose([drawn(ax).norm.vmin, drawn(ax).norm.vmax], [2, 2 + MIN_RANGE])


@pytest.mark.parametrize(("array", "n_corners"), [("hexagonal", 6), ("square", 4)])
def test_points_are_the_cells_of_their_lattice(array, n_corners):
    adata = synthetic(60, n_genes=10, array=array, rotation=20)
    dense = upsampled(adata, 3)
    corners = corners_of(drawn(pl.genes(adata, "region_00", dense=dense, show=False)[1]))
    assert len(corners) == dense.n_obs
    assert_allclose(corners.mean(1), dense.obsm["spatial"])
    x, y = np.moveaxis(corners, 2, 0)
    area = np.abs((x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(1)) / 2
    assert_allclose(area, np.abs(np.linalg.det(steps_of(adata) / 3)), rtol=1e-5)
    sides = np.hypot(*(corners[0] - np.roll(corners[0], 1, 0)).T)
    assert (sides > 0.01 * sides.max()).sum() == n_corners


@given(angle=st.floats(0, 90), skew=st.sampled_from([0.0, 0.5]), random_state=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_cell_holds_what_is_nearest_to_its_point(angle, skew, random_state):
    turn = np.exp(1j * np.deg2rad(angle))
    second = turn * (skew + 1j * np.sqrt(1 - skew**2))
    basis = 7 * np.array([[turn.real, turn.imag], [second.real, second.imag]])
    cell = mpl.path.Path(grids.Lattice(np.zeros(2), basis).cell)
    places = np.random.default_rng(random_state).uniform(-10, 10, (200, 2))
    lattice = (np.indices((9, 9)).reshape(2, -1).T - 4) @ basis
    distance = np.linalg.norm(places[:, None] - lattice, axis=2)
    own = distance[:, 40]
    others = np.delete(distance, 40, axis=1).min(1)
    clear = np.abs(own - others) > 1e-6
    assert_array_equal(cell.contains_points(places)[clear], (own < others)[clear])


def test_points_without_a_lattice_are_squares_of_their_spacing(adata):
    points = np.random.default_rng(0).uniform(100, 400, (80, 2))
    dense = ad.AnnData(synthetic_truth(adata, points), var=adata.var, obsm={"spatial": points})
    corners = corners_of(drawn(pl.genes(adata, "fine_01", dense=dense, show=False)[1]))
    spacing = np.median(KDTree(points).query(points, k=2)[0][:, 1])
    assert corners.shape == (80, 4, 2)
    assert_allclose(np.ptp(corners, axis=1), spacing)
    assert_allclose(corners.mean(1), points)


def test_the_image_is_under_the_spots_in_full_resolution_pixels(adata):
    picture = adata.uns["spatial"]["synthetic_0"]["images"]["hires"]
    height, width, _ = picture.shape
    [ax] = pl.genes(adata, "fine_01", show=False)
    [image] = ax.images
    assert_allclose(image.get_extent(), [0, width, height, 0])
    small = adata.copy()
    entry = small.uns["spatial"]["synthetic_0"]
    entry["images"] = {"hires": np.zeros((8, 8, 3), np.uint8), "lowres": picture[::4, ::4]}  # as a broken file has it
    entry["scalefactors"]["tissue_lowres_scalef"] = 0.25
    with pytest.warns(UserWarning, match="the 'hires' image of section 'synthetic_0' is blank"):
        [ax] = pl.genes(small, "fine_01", show=False)
    assert_allclose(ax.images[0].get_extent(), [0, width, height, 0], atol=4)
    assert_array_equal(ax.images[0].get_array(), picture[::4, ::4])
    large = adata.copy()
    large.uns["spatial"]["synthetic_0"] = {
        "images": {"hires": picture.repeat(8, axis=0).repeat(8, axis=1)},
        "scalefactors": {"tissue_hires_scalef": 8.0},
    }
    [ax] = pl.genes(large, "fine_01", show=False)
    assert max(ax.images[0].get_array().shape) <= 2000  # more would be slow and not seen
    assert_allclose(ax.images[0].get_extent(), [0, width, height, 0], atol=1)


def test_genes_are_drawn_without_an_image(adata):
    assert not pl.genes(adata, "fine_01", image=False, show=False)[0].images
    bare = ad.AnnData(adata.X, obs=adata.obs, var=adata.var, obsm={"spatial": adata.obsm["spatial"]})
    [ax] = pl.genes(bare, "fine_01", show=False)
    assert not ax.images
    assert ax.get_aspect() == 1
    assert_allclose(drawn(ax).get_widths(), 27.5, rtol=1e-3)  # 0.55 of the pitch where the diameter is unknown
    assert not [artist for artist in ax.artists if isinstance(artist, AnchoredSizeBar)]


def test_the_scale_bar_has_the_length_of_its_label(adata, dense):
    def bar(*args, **options):
        axes = pl.genes(*args, show=False, **options)
        assert not any(isinstance(artist, AnchoredSizeBar) for ax in axes[1:] for artist in ax.artists)
        bars = [artist for artist in axes[0].artists if isinstance(artist, AnchoredSizeBar)]
        return axes[0], bars[0] if bars else None

    ax, found = bar(adata, GENES, dense=dense)
    [line] = found.size_bar.get_children()
    um, unit = found.txt_label.get_text().split()
    assert unit == "µm"
    assert_allclose(line.get_width() * 2.0, float(um))  # 2 µm/px
    assert line.get_width() <= np.ptp(ax.get_xlim()) / 3
    measured = adata.copy()
    del measured.uns["spatial"]["synthetic_0"]["scalefactors"]["microns_per_pixel"]
    assert bar(measured, "fine_01")[1] is None
    measured.uns["sthisto"] = {
        "features": {"X": {"sections": np.array(["b", "synthetic_0"]), "mpp": np.array([1.0, 20.0])}}
    }
    _, found = bar(measured, "fine_01")
    [line] = found.size_bar.get_children()
    mm, unit = found.txt_label.get_text().split()
    assert unit == "mm"
    assert_allclose(line.get_width() * 20.0, 1000 * float(mm))


def test_titles_and_labels(adata, dense):
    named = adata.copy()
    named.var["symbol"] = ["PCP4", np.nan, *adata.var_names[2:]]
    named.layers["sthisto"] = named.X / 2
    figure = pl.genes(named, ["region_00", "fine_01"], dense=dense, layer="sthisto", return_fig=True)
    panels, bars = figure.axes[:4], figure.axes[4:]
    assert [ax.get_title("left") for ax in panels] == ["PCP4 (region_00)", "", "fine_01", ""]
    assert [ax.get_xlabel() for ax in panels] == ["sthisto", "dense"] * 2
    assert [ax.get_ylabel() for ax in bars] == ["log-normalized expression"] * 2
    assert_allclose(drawn(panels[0]).get_array(), 0.5 * adata[:, "region_00"].X.toarray().ravel())
    assert pl.genes(adata, "fine_01", show=False)[0].get_xlabel() == "measured"


def test_columns(adata, dense):
    def places(axes):
        return [(ax.get_subplotspec().rowspan.start, ax.get_subplotspec().colspan.start) for ax in axes]

    four = list(adata.var_names[:4])
    assert places(pl.genes(adata, four, show=False)) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert places(pl.genes(adata, four[:2], dense=dense, show=False)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    ten = places(pl.genes(adata, list(adata.var_names), dense=dense, show=False))
    assert ten[:6] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]  # two genes side by side


def test_one_section_of_several():
    pair = synthetic(40, n_genes=10, n_sections=2)
    second = pair[pair.obs["library"] == "synthetic_1"]
    [ax] = pl.genes(second, "fine_01", library_key="library", show=False)
    assert_array_equal(drawn(ax).get_offsets(), second.obsm["spatial"])
    height, width, _ = pair.uns["spatial"]["synthetic_1"]["images"]["hires"].shape
    assert_allclose(ax.images[0].get_extent(), [0, width, height, 0])
    dense = upsampled(second.copy(), 2, "synthetic_1")
    dense.obs["library"] = "synthetic_1"
    axes = pl.genes(second, "fine_01", dense=dense, library_key="library", show=False)
    assert len(drawn(axes[1]).get_offsets()) == dense.n_obs
    with pytest.raises(KeyError, match="dense has no points of section 'synthetic_0'"):
        pl.genes(pair, "fine_01", dense=dense, library_key="library", show=False)


def test_the_objects_are_left_alone(adata, dense):
    before = adata.copy(), dense.copy()
    pl.genes(adata, GENES, dense=dense, show=False)
    for now, then in zip((adata, dense), before, strict=True):
        assert set(now.uns) == set(then.uns)
        assert_array_equal(now.obsm["spatial"], then.obsm["spatial"])
        assert_array_equal(np.asarray(now.X.sum()), np.asarray(then.X.sum()))


def test_what_cannot_be_drawn_is_refused(adata, dense):
    with pytest.raises(ValueError, match="no gene to draw"):
        pl.genes(adata, [])
    with pytest.raises(TypeError, match=r"genes= is a AnnData: .* pass dense points as dense="):
        pl.genes(adata, dense)
    with pytest.raises(TypeError, match="unexpected keyword argument 'ncols'"):
        pl.genes(adata, "fine_01", ncols=2)
    with pytest.raises(KeyError, match=r"\['region_0'\] are not in adata.*did you mean .*'region_00'"):
        pl.genes(adata, ["region_0", "fine_01"])
    with pytest.raises(KeyError, match=r"\['fine_01'\] are not in dense"):
        pl.genes(adata, "fine_01", dense=dense[:, ["region_00"]].copy())
    with pytest.raises(KeyError, match=r"no layer 'sthisto' in adata.layers \(found: \['counts'\]"):
        pl.genes(adata, "fine_01", layer="sthisto")
    with pytest.raises(ValueError, match="'max' is not a color limit"):
        pl.genes(adata, "fine_01", vmax="max")
    with pytest.raises(ValueError, match="'p101' is not a color limit"):
        pl.genes(adata, "fine_01", vmax="p101")
    denoised = adata.copy()
    denoised.layers["sthisto"] = np.full(adata.shape, np.nan, np.float32)
    with pytest.raises(ValueError, match=r"\['fine_01'\] have no values"):
        pl.genes(denoised, "fine_01", layer="sthisto")


@pytest.mark.parametrize(
    ("interactive", "show", "shown"), [(True, None, 1), (False, None, 0), (False, True, 1), (True, False, 0)]
)
def test_show_save_and_return(adata, tmp_path, monkeypatch, interactive, show, shown):
    calls = []
    monkeypatch.setattr(plt, "isinteractive", lambda: interactive)
    monkeypatch.setattr(plt, "show", lambda: calls.append(1))
    result = pl.genes(adata, "fine_01", show=show, save=tmp_path / "picture.png")
    assert len(calls) == shown
    assert (result is None) == bool(shown)
    assert plt.imread(tmp_path / "picture.png").std() > 0
    assert isinstance(pl.genes(adata, "fine_01", return_fig=True), plt.Figure)


def test_a_visium_section():
    path = DATA / "dlpfc" / "151673.h5ad"
    if not path.exists():
        pytest.skip("the DLPFC section is not here")
    adata = ad.read_h5ad(path)
    [ax] = pl.genes(adata, "ENSG00000183036", show=False)
    assert len(drawn(ax).get_offsets()) == adata.n_obs
    corners = corners_of(drawn(ax))  # of more spots than discs could be told apart of
    assert_allclose(np.ptp(corners, axis=1).min(axis=1), 137, rtol=0.02)  # as wide as the pitch, pixels
    _, width, height, _ = ax.images[0].get_extent()
    assert_allclose([width, height], 600 / 0.045004502)
    assert (adata.obsm["spatial"] < [width, height]).all()


def predicted(adata, key="sthisto"):
    """The section as predict leaves it, with the truth for a prediction."""
    adata = adata.copy()
    adata.layers[key] = synthetic_truth(adata)
    adata.layers[f"{key}_std"] = 0.1 + 0.2 * adata.layers[key]
    return adata


def test_measured_denoised_dense_and_uncertain_side_by_side(adata, dense):
    adata, dense = predicted(adata), dense.copy()
    dense.layers["std"] = dense.X / 7
    kinds = ["measured", "denoised", "dense", "uncertainty"]
    figure = pl.genes(adata, ["region_00", "fine_01"], dense=dense, panels=kinds, return_fig=True)
    panels, bars = figure.axes[:8], figure.axes[8:]
    assert [ax.get_xlabel() for ax in panels] == kinds * 2
    assert [ax.get_ylabel() for ax in bars] == ["log-normalized\nexpression", "std of expression"] * 2
    measured, denoised, points, uncertain = (drawn(ax) for ax in panels[4:])
    assert measured.norm is denoised.norm is points.norm is not uncertain.norm
    assert measured.get_cmap() != uncertain.get_cmap()
    assert_array_equal(denoised.get_array(), adata[:, "fine_01"].layers["sthisto"].ravel())
    assert_array_equal(uncertain.get_array(), dense[:, "fine_01"].layers["std"].ravel())
    assert_allclose(uncertain.norm.vmax, np.percentile(dense[:, "fine_01"].layers["std"], 99), rtol=1e-6)
    [ax] = pl.genes(adata, "fine_01", panels="uncertainty", show=False)  # of the spots without dense points
    assert_array_equal(drawn(ax).get_array(), adata[:, "fine_01"].layers["sthisto_std"].ravel())


def test_panels_that_cannot_be_drawn_are_refused(adata, dense):
    with pytest.raises(ValueError, match="no panel 'raw': there are 'measured', 'denoised', 'dense' and"):
        pl.genes(adata, "fine_01", panels=["raw"])
    with pytest.raises(ValueError, match="pass it as dense="):
        pl.genes(adata, "fine_01", panels=["dense"])
    with pytest.raises(KeyError, match=r"no layer 'sthisto' .*run sthisto.tl.predict"):
        pl.genes(adata, "fine_01", dense=dense, panels=["measured", "denoised"])
    with pytest.raises(KeyError, match=r"no layer 'std' in dense\.layers"):
        pl.genes(adata, "fine_01", dense=dense, panels=["uncertainty"])
    with pytest.raises(TypeError, match="not dict"):
        pl.genes({}, genes="fine_01")


def test_titles_have_the_held_out_correlation_and_warnings(adata, dense):
    measured, adata = adata, adata.copy()
    adata.var["sthisto_pearson"] = 0.5
    adata.var["sthisto_qvalue"] = 0.01
    adata.var.loc["fine_01", "sthisto_qvalue"] = 0.06
    adata.var.loc["hidden_03", "sthisto_pearson"] = 0.04
    adata.var.loc["noise_04", ["sthisto_pearson", "sthisto_qvalue"]] = np.nan
    names = [*GENES, "noise_04"]
    figure = pl.genes(adata, names, dense=dense, return_fig=True)
    titles = [ax.get_title("left").replace("\n", " ") for ax in figure.axes[: 2 * len(names) : 2]]
    assert titles[0] == "region_00 held-out r 0.50"
    assert titles[1] == "fine_01 no significant link to the image: q 0.06 (held-out r 0.50)"
    assert titles[2] == "hidden_03 poorly predicted on held-out spots: r 0.04"
    colors = [ax._left_title.get_color() for ax in figure.axes[: 2 * len(names) : 2]]
    assert [color == WARNING for color in colors] == [False, True, True, False]
    assert titles[3] == "noise_04"  # never scored: nothing is known
    assert pl.genes(adata, "fine_01", show=False)[0].get_title("left") == "fine_01"  # measured, not predicted
    dense = dense.copy()
    dense.var = adata.var.drop(columns="sthisto_qvalue")  # as upsample hands it on
    head, _ = pl.genes(measured, "hidden_03", dense=dense, show=False)
    assert head.get_title("left") == "hidden_03\npoorly predicted on held-out spots: r 0.04"


def test_the_image_in_a_panel_of_its_own(adata, dense):
    axes = pl.genes(adata, ["region_00", "fine_01"], dense=dense, image="panel", show=False)
    assert [ax.get_xlabel() for ax in axes] == ["image", "measured", "dense"] * 2
    assert [len(ax.images) for ax in axes] == [1, 0, 0] * 2
    assert [len(ax.collections) for ax in axes] == [0, 1, 1] * 2
    assert axes[0].images[0].get_alpha() == 1
    assert axes[0].get_xlim() == axes[1].get_xlim()
    bare = ad.AnnData(adata.X, obs=adata.obs, var=adata.var, obsm={"spatial": adata.obsm["spatial"]})
    assert len(pl.genes(bare, "fine_01", image="panel", show=False)) == 1


def test_several_sections_have_one_scale_and_their_own_frames():
    pair = synthetic(40, n_genes=10, n_sections=2)
    axes = pl.genes(pair, ["region_00", "fine_01"], library_key="library", show=False)
    assert [ax.get_title("left") for ax in axes] == [
        f"{gene}, {name}" for gene in ("region_00", "fine_01") for name in ("synthetic_0", "synthetic_1")
    ]
    assert drawn(axes[0]).norm.vmax == drawn(axes[1]).norm.vmax != drawn(axes[2]).norm.vmax
    for ax, name in zip(axes, ["synthetic_0", "synthetic_1"] * 2, strict=True):
        section = pair[pair.obs["library"] == name]
        assert_array_equal(drawn(ax).get_offsets(), section.obsm["spatial"])
        assert_allclose(ax.get_xlim(), [f(section.obsm["spatial"][:, 0]) + d for f, d in ((min, -27.5), (max, 27.5))])
    bars = [sum(isinstance(artist, AnchoredSizeBar) for artist in ax.artists) for ax in axes]
    assert bars == [1, 1, 0, 0]


def test_opacity_is_of_all_points_together(adata, dense):
    plain = pl.genes(adata, "fine_01", dense=dense, return_fig=True)
    faded = pl.genes(adata, "fine_01", dense=dense, alpha=0.5, return_fig=True)
    assert plain.axes[0].images[0].get_alpha() < faded.axes[0].images[0].get_alpha()  # the tissue shines through
    for ax in faded.axes[:2]:
        for image in ax.images:
            image.remove()
        drawn(ax).set(array=None, facecolor="black")
    ax = faded.axes[1]
    faded.canvas.draw()
    inside = KDTree(adata.obsm["spatial"]).query(dense.obsm["spatial"])[0] < 5
    x, y = ax.transData.transform(dense.obsm["spatial"][inside]).astype(int).T
    shades = np.asarray(faded.canvas.buffer_rgba())[::-1][y[:, None] + np.arange(-9, 10), x[:, None], 0]
    assert set(np.unique(shades)) <= {127, 128}  # cells overlap by a pixel, and no seam is seen


def test_bins_as_wide_as_their_pitch_are_squares(adata):
    """As Visium HD's are, in tables of spots."""
    bins = synthetic(60, n_genes=10, array="square", pitch_um=16)
    assert isinstance(drawn(pl.genes(bins, "fine_01", show=False)[0]), EllipseCollection)
    bins.uns["spatial"]["synthetic_0"]["scalefactors"]["spot_diameter_fullres"] = 8.0  # px: 16 µm at 2 µm/px
    corners = corners_of(drawn(pl.genes(bins, "fine_01", show=False)[0]))
    assert_allclose(np.ptp(corners, axis=1), 8, rtol=1e-6)
    assert_allclose(corners.mean(1), bins.obsm["spatial"], atol=1e-6)


def test_genes_are_drawn_into_given_axes(adata, dense):
    _, axes = plt.subplots(2, 2)
    assert pl.genes(adata, ["region_00", "fine_01"], dense=dense, ax=axes, show=False) == list(axes.ravel())
    assert len(axes[1, 1].collections) == 1
    single, ax = plt.subplots()
    assert pl.genes(adata, "fine_01", ax=ax, return_fig=True) is single
    with pytest.raises(ValueError, match="ax holds 4 axes; this figure has 2 panels"):
        pl.genes(adata, "fine_01", dense=dense, ax=axes)


def test_spots_without_a_value_are_grey(adata):
    holes = adata.copy()
    holes.layers["holes"] = holes.X.toarray()
    holes.layers["holes"][:5] = np.nan
    figure = pl.genes(holes, "fine_01", layer="holes", return_fig=True)
    figure.canvas.draw()
    colors = drawn(figure.axes[0]).get_facecolors()
    assert_allclose(colors[:5], np.tile(mpl.colors.to_rgba("#c8c8c8"), (5, 1)))
    assert not (np.abs(colors[5:] - colors[0]) < 1e-6).all(axis=1).any()


def test_figures_have_a_notebooks_width_and_labels_do_not_overlap(adata, dense):
    adata = predicted(adata)
    adata.var["sthisto_pearson"], adata.var["sthisto_qvalue"] = 0.63, 0.06
    for panels in (["measured"], ["measured", "denoised", "dense"]):
        for genes in (["region_00"], [*GENES, "noise_04"], list(adata.var_names)):
            figure = pl.genes(adata, genes, dense=dense, panels=panels, return_fig=True)
            assert figure.get_figwidth() <= 9
            assert figure.get_figheight() < 16
            figure.canvas.draw()
            renderer = figure.canvas.get_renderer()
            words = [ax.title.get_window_extent(renderer) for ax in figure.axes if ax.get_title()]
            words += [ax._left_title.get_window_extent(renderer) for ax in figure.axes if ax.get_title("left")]
            words += [ax.xaxis.label.get_window_extent(renderer) for ax in figure.axes if ax.get_xlabel()]
            words += [artist.get_window_extent(renderer) for ax in figure.axes for artist in ax.artists]
            assert not [(a, b) for i, a in enumerate(words) for b in words[:i] if a.overlaps(b)]


def test_a_rare_genes_noise_does_not_fill_the_color_scale(adata, dense):
    rare, noise = adata.copy(), dense.copy()
    rare.X = np.zeros(adata.shape, np.float32)
    rare.X[0] = 4.0  # the 99th percentile of 60 spots is below it, of 600 it would be 0
    noise.X = np.random.default_rng(0).uniform(0.005, 0.016, dense.shape).astype(np.float32)
    measured, _ = pl.genes(rare, "fine_01", dense=noise, show=False)
    assert drawn(measured).norm.vmax == 4
    noise.var = adata.var
    [alone] = pl.genes(noise, "fine_01", show=False)
    low, high = drawn(alone).norm.vmin, drawn(alone).norm.vmax
    assert_allclose(high - low, MIN_RANGE)


def test_color_bars_show_that_values_are_beyond_them(adata):
    def extension(**limits):
        figure = pl.genes(adata, "region_00", return_fig=True, **limits)
        return figure.axes[-1]._colorbar.extend

    assert extension() in {"max", "both"}
    assert extension(vmin="p0", vmax="p100") == "neither"
    assert extension(vmin="p50", vmax="p100") == "min"
    assert extension(vmin="p50", vmax="p90") == "both"
    assert extension(norm=mpl.colors.Normalize(-1, 0.1)) == "max"


def test_counts_have_a_color_scale_of_their_own(adata, dense):
    figure = pl.genes(adata, "region_00", dense=dense, layer="counts", return_fig=True)
    assert [ax.get_ylabel() for ax in figure.axes[2:]] == ["counts", "log-normalized expression"]
    scaled = adata.copy()
    scaled.X = scaled.X.toarray() - scaled.X.max()
    assert pl.genes(scaled, "region_00", return_fig=True).axes[1].get_ylabel() == "expression"


@pytest.mark.parametrize("kind", ["channels first", "uint16", "text factor", "array factor"])
def test_images_of_every_kind_that_features_are_extracted_from(adata, kind):
    other = adata.copy()
    entry = other.uns["spatial"]["synthetic_0"]
    picture = entry["images"]["hires"]
    if kind == "channels first":
        entry["images"]["hires"] = np.moveaxis(picture, -1, 0)
    elif kind == "uint16":
        entry["images"]["hires"] = picture.astype(np.uint16) * 257
    else:
        entry["scalefactors"]["tissue_hires_scalef"] = "1.0" if kind == "text factor" else np.array([1.0])
    [ax] = pl.genes(other, "fine_01", show=False)
    [image] = ax.images
    assert_allclose(image.get_extent(), [0, picture.shape[1], picture.shape[0], 0])
    assert_array_equal(image.get_array(), picture)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        np.zeros(3),
        {"images": None, "scalefactors": None},
        {"images": {"hires": None}, "scalefactors": {"tissue_hires_scalef": 1.0}},
        {"images": {"hires": np.zeros((0, 0, 3))}, "scalefactors": {"tissue_hires_scalef": 1.0}},
    ],
)
def test_entries_without_an_image_are_drawn_without_one(adata, entry):
    other = adata.copy()
    other.uns["spatial"] = {"synthetic_0": entry}
    [ax] = pl.genes(other, "fine_01", show=False)
    assert not ax.images
    assert_allclose(drawn(ax).get_widths(), 27.5, rtol=1e-3)


@pytest.mark.parametrize("factor", [None, np.array([]), "unknown"])
def test_images_of_unknown_scale_are_named_and_not_drawn(adata, factor):
    other = adata.copy()
    other.uns["spatial"]["synthetic_0"]["scalefactors"]["tissue_hires_scalef"] = factor
    with pytest.warns(UserWarning, match=r"the image of section 'synthetic_0' is not drawn: .*tissue_hires_scalef"):
        [ax] = pl.genes(other, "fine_01", show=False)
    assert not ax.images


def test_invalid_scale_factors_are_named_and_ignored(adata):
    other = adata.copy()
    other.uns["spatial"]["synthetic_0"]["scalefactors"]["spot_diameter_fullres"] = "n/a"
    with pytest.warns(UserWarning, match=r"'spot_diameter_fullres'.* is 'n/a': .* It is ignored here"):
        [ax] = pl.genes(other, "fine_01", show=False)
    assert_allclose(drawn(ax).get_widths(), 27.5, rtol=1e-3)


def test_an_image_of_another_range_is_not_drawn_and_named(adata):
    other = adata.copy()
    other.uns["spatial"]["synthetic_0"]["images"]["hires"] = np.full((9, 9), 300.0) * np.arange(9)
    with pytest.warns(UserWarning, match=r"the image of section 'synthetic_0' is not drawn: Float pixels"):
        pl.genes(other, "fine_01", show=False)


def test_text_and_scale_bars_are_visible_on_dark_backgrounds(adata):
    with plt.style.context("dark_background"):
        [ax] = pl.genes(adata, "fine_01", show=False)
    [bar] = [artist for artist in ax.artists if isinstance(artist, AnchoredSizeBar)]
    assert mpl.colors.to_hex(bar.size_bar.get_children()[0].get_edgecolor()) == "#ffffff"

"""Overlays are registered to the tissue: rendered to pixels, the brightest spot is where the data have it."""

import matplotlib as mpl

mpl.use("Agg")

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import block_reduce

from sthisto import grids, pl
from sthisto.datasets import synthetic, synthetic_truth

GENE = "region_00"


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def rendered(figure, ax, wanted):
    """Middle, in pixels of the section, of what a figure shows in one color within axes."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3].astype(int)  # row 0 at the bottom, as axes have it
    box = ax.get_window_extent()
    rows, columns = np.nonzero(np.abs(pixels - np.array(wanted)).sum(axis=2) <= 6)
    inside = (rows > box.y0) & (rows < box.y1) & (columns > box.x0) & (columns < box.x1)
    assert inside.any()
    return ax.transData.inverted().transform(np.stack([columns[inside], rows[inside]], axis=1) + 0.5)


def peaked(adata, xy, place):
    """A gene that falls with the distance from a place."""
    return np.exp(-np.linalg.norm(xy - place, axis=1) / 200).astype(np.float32)


BRIGHTEST = np.round(np.array(mpl.colormaps["viridis"](1.0)[:3]) * 255)


@pytest.mark.parametrize("array", ["hexagonal", "square"])
@pytest.mark.parametrize("rotation", [0, 23])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_brightest_spot_is_drawn_where_it_was_measured(array, rotation, scale):
    """For images at full resolution and at a scale of their own."""
    adata = synthetic(80, n_genes=10, array=array, rotation=rotation)
    pitch = grids.spacing(adata.obsm["spatial"])
    entry = adata.uns["spatial"]["synthetic_0"]
    step = round(1 / scale)
    entry["images"]["hires"] = block_reduce(entry["images"]["hires"], (step, step, 1), np.mean).astype(np.uint8)
    entry["scalefactors"]["tissue_hires_scalef"] = 1 / step
    place = adata.obsm["spatial"][33]
    adata.layers["peak"] = np.tile(peaked(adata, adata.obsm["spatial"], place)[:, None], (1, adata.n_vars))
    for image in (True, "panel"):
        figure = pl.genes(adata, GENE, layer="peak", image=image, vmax=1.0, vmin=0.0, return_fig=True)
        found = rendered(figure, figure.axes[image == "panel"], BRIGHTEST)
        assert np.linalg.norm(found.mean(axis=0) - place) < 0.1 * pitch
        assert np.linalg.norm(found - place, axis=1).max() < 0.5 * pitch


@given(rotation=st.floats(0, 90), row=st.integers(0, 79), factor=st.integers(1, 3))
@settings(max_examples=6, deadline=None)
def test_the_brightest_point_is_drawn_where_it_was_predicted(rotation, row, factor):
    adata = synthetic(80, n_genes=10, rotation=rotation)
    fine = grids.Lattice.fit(adata.obsm["spatial"]).refine(factor)
    points = fine.points(fine.cover(adata.obsm["spatial"], 30))
    place = adata.obsm["spatial"][row]
    values = np.tile(peaked(adata, points, place)[:, None], (1, adata.n_vars))
    dense = ad.AnnData(values, var=adata.var, obsm={"spatial": points}, layers={"std": values})
    figure = pl.genes(adata, GENE, dense=dense, vmin=0.0, vmax=1.0, return_fig=True)
    found = rendered(figure, figure.axes[1], BRIGHTEST)
    assert np.linalg.norm(found.mean(axis=0) - place) < 0.5 * fine.pitch
    figure = pl.uncertainty(dense, GENE, vmin=0.0, vmax=1.0, cmap="viridis", return_fig=True)
    found = rendered(figure, figure.axes[0], BRIGHTEST)
    assert np.linalg.norm(found.mean(axis=0) - place) < 0.5 * fine.pitch
    plt.close("all")


def test_a_true_map_is_brightest_where_the_tissue_is():
    """A gene of a layer on a turned array, drawn dense: its maximum is the true one."""
    adata = synthetic(150, n_genes=10, rotation=17)
    lattice = grids.Lattice.fit(adata.obsm["spatial"])
    fine = lattice.refine(3)
    points = fine.points(fine.cover(adata.obsm["spatial"], 30))
    truth = synthetic_truth(adata, points)[:, adata.var_names == GENE]
    dense = ad.AnnData(truth, var=adata.var.loc[[GENE]], obsm={"spatial": points})
    figure = pl.genes(adata, GENE, dense=dense, vmax="p100", vmin="p0", image=False, return_fig=True)
    figure.axes[1].collections[0].set_norm(mpl.colors.Normalize(truth.min(), truth.max()))
    found = rendered(figure, figure.axes[1], BRIGHTEST)
    distance = np.linalg.norm(found - points[truth.argmax()], axis=1)
    assert distance.min() < 0.5 * lattice.pitch
    there = truth[grids.nearest(found, points)[1][:, 0]]
    assert np.median(there) > truth.min() + 0.99 * np.ptp(truth)  # and what is as bright is as high


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_image_pixels_are_at_their_coordinates(scale):
    """A black square in the image is drawn at its full-resolution coordinates."""
    adata = synthetic(80, n_genes=10, rotation=10)
    height, width, _ = adata.uns["spatial"]["synthetic_0"]["images"]["hires"].shape
    pixels = np.full((int(height * scale), int(width * scale), 3), 255, np.uint8)
    spot = adata.obsm["spatial"][40]
    x, y = (spot * scale).astype(int)
    half = max(1, int(20 * scale))
    pixels[y - half : y + half, x - half : x + half] = (255, 0, 255)
    entry = adata.uns["spatial"]["synthetic_0"]
    entry["images"]["hires"], entry["scalefactors"]["tissue_hires_scalef"] = pixels, scale
    figure = pl.genes(adata, GENE, image="panel", return_fig=True)
    found = rendered(figure, figure.axes[0], (255, 0, 255)).mean(axis=0)
    assert np.linalg.norm(found - spot) < 0.1 * grids.spacing(adata.obsm["spatial"])


def test_cells_leave_no_ground_between_them():
    adata = synthetic(120, n_genes=10, rotation=31)
    adata.obs["one"] = "tissue"
    figure = pl.domains(adata, "one", palette=["#000000"], return_fig=True)
    [ax] = figure.axes
    ax.get_legend().remove()
    for bar in ax.artists:
        bar.remove()
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[::-1, :, 0]
    rows, columns = np.indices(pixels.shape)
    places = ax.transData.inverted().transform(np.stack([columns, rows], axis=-1).reshape(-1, 2) + 0.5)
    reach = grids.Lattice.fit(adata.obsm["spatial"]).reach
    covered = grids.nearest(places, adata.obsm["spatial"])[0][:, 0] < 0.8 * reach  # within every cell's inner circle
    assert (pixels.ravel()[covered] == 0).all()

"""Figures of registration, read back from their artists."""

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

from sthisto import pl
from sthisto.datasets import synthetic

SHIFTS = np.linspace(-1, 1, 5)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def report_of(*sections):
    profile = np.zeros((5, 5))
    profile[3, 1] = 0.5  # down by half a pitch, and to the left
    row = {
        "verdict": "misaligned",
        "statistic": 0.1,
        "best_statistic": 0.5,
        "matrix": np.array([[1.0, 0, -25], [0, 1.0, 25]]),
        "shifts": SHIFTS,
        "profile": profile,
    }
    return pd.DataFrame([{"section": name, **row} for name in sections])


def test_alignment_draws_the_statistic_over_shifts_and_the_spots_before_and_after():
    adata = synthetic(60, n_genes=10)
    profile, before, after = pl.alignment(adata, report_of("synthetic_0"), show=False)
    assert_allclose(profile.images[0].get_extent(), [-1.25, 1.25, 1.25, -1.25])
    as_it_is, highest = profile.lines
    assert_allclose(as_it_is.get_xydata(), [[0, 0]])
    assert_allclose(highest.get_xydata(), [[-0.5, 0.5]])
    assert profile.get_title("left") == "misaligned"
    xy = adata.obsm["spatial"]
    assert_allclose(before.collections[0].get_offsets(), xy)
    assert_allclose(after.collections[0].get_offsets(), xy + np.array([-25, 25]))
    assert before.get_xlim() == after.get_xlim()
    assert (before.get_xlabel(), after.get_xlabel()) == ("before: 0.100", "after: 0.500")


def test_spots_outside_the_image_are_in_the_frame():
    adata = synthetic(60, n_genes=10)
    adata.obsm["spatial"] = adata.obsm["spatial"] - 3000
    _, before, _ = pl.alignment(adata, report_of("synthetic_0"), show=False)
    assert before.get_xlim()[0] < adata.obsm["spatial"][:, 0].min()
    assert before.get_xlim()[1] >= adata.uns["spatial"]["synthetic_0"]["images"]["hires"].shape[1]


def test_alignment_of_several_sections():
    pair = synthetic(40, n_genes=10, n_sections=2)
    axes = pl.alignment(pair, report_of("synthetic_0", "synthetic_1"), library_key="library", show=False)
    assert [ax.get_title("left") for ax in axes[::3]] == ["synthetic_0: misaligned", "synthetic_1: misaligned"]
    with pytest.raises(KeyError, match=r"no section \['synthetic_1'\] \(found: \['synthetic_0'\]\)"):
        pl.alignment(pair, report_of("synthetic_0"), library_key="library")

"""Figures of scores and of training, read back from their artists."""

import matplotlib as mpl

mpl.use("Agg")

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sthisto import pl


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


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


def test_history_of_a_model_without_epochs_is_refused():
    with pytest.raises(KeyError, match=r"no fitted model 'sthisto' \(found: \['mine'\]\): run sthisto.tl.fit"):
        pl.history(fitted(train=np.ones(3)))
    with pytest.raises(KeyError, match=r"found: \[\]"):
        pl.history(ad.AnnData(np.zeros((3, 2), np.float32)))
    with pytest.raises(ValueError, match=r"'attention' is fitted in one step.*sthisto.pl.evaluation draws"):
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
        points = np.concatenate([drawn.get_offsets() for drawn in ax.collections])
        expected = np.add.outer([0.5, 0.3], [0, 0.01, 0.02]).ravel() + level
        assert_allclose(points[:, 1], expected)
        assert_allclose(ax.lines[0].get_ydata(), 0.81 + level)
        assert "noise ceiling" in [text.get_text() for text in ax.texts]
    assert random.get_ylim() == block.get_ylim()
    assert random.get_ylim()[1] > 0.93
    assert random.get_title() == "random spots held out"
    assert block.get_title() == "blocks of spots held out"
    [cloud] = genes.collections
    assert_allclose(cloud.get_offsets(), [[0.51, 0.31], [0.511, 0.311]])
    assert genes.get_title() == "pearson of 2 genes,\nrandom spots held out"
    assert (genes.get_xlabel(), genes.get_ylabel()) == ("attention (better for 2)", "idw (better for 0)")
    assert_allclose(*genes.lines[0].get_data())


def test_evaluation_draws_the_pair_asked_for_and_none_of_one_model(tmp_path):
    table = scores(attention=0.5, gp=0.4, idw=0.3)
    axes = pl.evaluation(table, models=("idw", "gp"), save=tmp_path / "picture.png", show=False)
    assert (axes[-1].get_xlabel(), axes[-1].get_ylabel()) == ("idw (better for 0)", "gp (better for 2)")
    assert plt.imread(tmp_path / "picture.png").std() > 0
    alone = pl.evaluation(table[table["model"] == "gp"], show=False)
    assert len(alone) == 2
    assert isinstance(pl.evaluation(table, return_fig=True), plt.Figure)


def test_evaluation_of_missing_scores_is_refused():
    table = scores(attention=0.5, idw=0.3)
    with pytest.raises(KeyError, match=r"no metric 'mse' in the table \(there are: pearson\)"):
        pl.evaluation(table, "mse")
    with pytest.raises(KeyError, match=r"models \['gp'\] are not in the table \(there are: attention, idw\)"):
        pl.evaluation(table, models=("gp", "idw"))
    with pytest.raises(ValueError, match="name two models, of attention, idw"):
        pl.evaluation(table, models=("idw", "idw"))
    with pytest.raises(KeyError, match="no scores of single genes"):
        pl.evaluation(table[table["gene"].isna()])


def test_evaluation_draws_into_given_axes():
    table = scores(attention=0.5, idw=0.3)
    _, axes = plt.subplots(1, 3)
    assert pl.evaluation(table, ax=axes, show=False) == list(axes)
    assert len(axes[0].patches) == 2
    assert len(axes[2].collections) == 1
    with pytest.raises(ValueError, match="ax holds 1 axes; this figure has 3 panels"):
        pl.evaluation(table, ax=axes[0])


def test_the_pair_counts_the_genes_that_each_model_predicts_better():
    table = scores(attention=0.5, idw=0.3)
    table.loc[(table["model"] == "idw") & (table["gene"] == "B"), "value"] = 0.9
    table.loc[(table["model"] == "attention") & (table["gene"] == "A"), "value"] = np.nan
    genes = pl.evaluation(table, show=False)[-1]
    assert genes.get_title() == "pearson of 1 genes,\nrandom spots held out"
    assert (genes.get_xlabel(), genes.get_ylabel()) == ("attention (better for 0)", "idw (better for 1)")
    errors = pl.evaluation(table.assign(metric="mse"), "mse", show=False)[-1]
    assert (errors.get_xlabel(), errors.get_ylabel()) == ("attention (better for 1)", "idw (better for 0)")

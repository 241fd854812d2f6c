"""Held-out scores against numpy, SciPy and scikit-learn by hand; nothing hidden reaches a prediction."""

import json

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse, stats
from sklearn.metrics import mean_absolute_error, mean_squared_error

from sthisto import datasets, evaluation, grids, metrics, pp, tl
from sthisto.cli import main
from sthisto.evaluation import AllSpotsSplit, BlockSplit, Dataset, RandomSplit, Split, choose_genes, compare, score
from sthisto.models import Section, build

COUNTS = {"counts_layer": "counts", "genes": 8}


def evaluate(adata, models="idw", **options):
    return tl.evaluate(adata, models, **{"split": "random", "n_repeats": 1, **COUNTS, **options})


def mean(table, model, metric="pearson", **of):
    rows = table[(table["model"] == model) & (table["metric"] == metric) & table["gene"].isna()]
    for column, value in of.items():
        rows = rows[rows[column] == value]
    return rows["value"].mean()


def by_gene(table, model, metric):
    rows = table[(table["model"] == model) & (table["metric"] == metric) & table["gene"].notna()]
    return rows.set_index("gene")["value"]


class Spy:
    """A model that predicts a constant and notes what it is given."""

    def fit(self, sections, *, random_state, device, progress):
        self.seen, self.random_state = sections, random_state
        return [section.expression for section in sections]

    def predict(self, points):
        self.asked = points
        return np.full((len(points), 2), -1.0, dtype=np.float32)


def thirty_spots():
    rng = np.random.default_rng(0)
    return Section(
        name="a",
        xy=rng.uniform(0, 9, (30, 2)),
        features=rng.normal(size=(30, 3)).astype(np.float32),
        expression=rng.gamma(1, 1, (30, 2)).astype(np.float32),
    )


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_a_fit_and_prediction_by_hand(section):
    adata = section.copy()
    table = evaluate(section, "ridge", counts_layer=None, genes=None, random_state=4)
    hidden = grids.hold_out(adata.obsm["spatial"], 0.5, random_state=4)
    tl.fit(adata, "ridge", train_on=~hidden, random_state=4)
    tl.predict(adata)
    truth, predicted = adata.X.toarray()[hidden], adata.layers["sthisto"][hidden]
    by_hand = {
        "pearson": lambda t, p: stats.pearsonr(t, p)[0],
        "spearman": lambda t, p: stats.spearmanr(t, p)[0],
        "mse": mean_squared_error,
        "mae": mean_absolute_error,
    }
    for metric, figure in by_hand.items():
        expected = [figure(t, p) for t, p in zip(truth.T, predicted.T, strict=True)]
        found = by_gene(table, "ridge", metric)
        assert list(found.index) == list(adata.var_names)
        assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        assert_allclose(mean(table, "ridge", metric), np.mean(expected), rtol=1e-4)
    level = adata.X.toarray()[~hidden].mean(axis=0)
    assert_allclose(by_gene(table, "gene mean", "mse"), ((truth - level) ** 2).mean(axis=0), rtol=1e-5)
    assert mean(table, "gene mean") == 0
    assert set(table["genes"]) == {"given"}
    assert "ceiling" not in set(table["model"])


@given(random_state=st.integers(0, 999), n=st.integers(3, 30))
@settings(max_examples=30, deadline=None)
def test_a_gene_given_up_on_counts_as_zero_and_one_without_a_truth_not_at_all(random_state, n):
    rng = np.random.default_rng(random_state)
    truth, predicted = rng.normal(size=(2, n, 4))
    truth[:, 0] = 2.0
    predicted[:, 1] = 5.0
    predicted[0, 2] = np.nan
    for name, reference in {"pearson": stats.pearsonr, "spearman": stats.spearmanr}.items():
        found = score(truth, predicted)[name]
        assert_array_equal(np.isnan(found), [True, False, True, False])
        assert found[1] == 0
        assert_allclose(found[3], reference(truth[:, 3], predicted[:, 3])[0], atol=1e-9)


def test_the_ceiling_is_that_of_the_hidden_counts(section):
    table = evaluate(section, random_state=3, genes=section.var_names[[4, 2]])
    hidden = grids.hold_out(section.obsm["spatial"], 0.5, random_state=3)
    expected = metrics.noise_ceiling(section.layers["counts"][hidden].toarray(), random_state=3)[[4, 2]]
    assert_allclose(by_gene(table, "ceiling", "pearson"), expected, rtol=1e-5)
    assert 0 < mean(table, "idw") < mean(table, "ceiling") < 1


def test_expression_from_counts_is_that_of_scanpy(section):
    expected = section.copy()
    expected.X = expected.layers["counts"].copy()
    sc.pp.normalize_total(expected, target_sum=1e4)
    sc.pp.log1p(expected)
    genes = list(section.var_names[3:7])
    from_counts = evaluate(section, genes=genes)
    from_x = evaluate(expected, genes=genes, counts_layer=None)
    for metric in ("pearson", "mse"):
        assert_allclose(by_gene(from_counts, "idw", metric), by_gene(from_x, "idw", metric), rtol=1e-4)


# --- hiding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["attention", "gp", "ridge", "idw"])
def test_what_is_hidden_changes_no_gene_and_no_bit_of_a_prediction(section, model, monkeypatch):
    predictions = []
    kind = type(build(model, None))
    original = kind.predict
    monkeypatch.setattr(
        kind, "predict", lambda self, points: predictions.append(original(self, points)) or predictions[-1]
    )
    hidden = grids.hold_out(section.obsm["spatial"], 0.5, random_state=0)
    genes = []
    for change in (False, True):
        adata = section.copy()
        if change:
            noise = np.random.default_rng(0).poisson(50, (int(hidden.sum()), adata.n_vars))
            counts = adata.layers["counts"].toarray()
            counts[hidden] = noise
            adata.layers["counts"] = sparse.csr_matrix(counts)
        genes.append(by_gene(evaluate(adata, model), model, "mse"))
    assert list(genes[0].index) == list(genes[1].index)
    assert not np.allclose(genes[0], genes[1])  # the scores do see it
    assert_array_equal(*predictions, strict=True)


def test_models_get_the_rows_that_are_left_and_are_asked_for_the_others():
    whole = thirty_spots()
    spy, hidden = Spy(), np.arange(30) % 3 == 0

    def patches(rows):
        return np.asarray(rows, dtype=np.uint8)[:, None, None, None]

    trial = Split(sections=[whole], held_out=[hidden], genes=["x", "y"])
    table = trial.run("spy", spy, patches=[patches], random_state=7, device="cpu")
    [seen] = spy.seen
    assert spy.random_state == 7
    assert spy.asked.expression is None
    for given_to, rows in ((seen, ~hidden), (spy.asked, hidden)):
        assert_array_equal(given_to.xy, whole.xy[rows])
        assert_array_equal(given_to.features, whole.features[rows])
        assert_array_equal(given_to.patches(np.array([2, 0])).ravel(), np.flatnonzero(rows)[[2, 0]])
    assert_array_equal(seen.expression, whole.expression[~hidden])
    assert_allclose(by_gene(table, "spy", "mae"), whole.expression[hidden].mean(axis=0))  # negative counts as 0
    assert mean(table, "spy") == 0


def test_blocks_are_hidden_whole_and_random_spots_are_not(section):
    table = evaluate(section, split=("random", BlockSplit(block=3)), n_repeats=2, random_state=1)
    assert list(table["split"].unique()) == ["random", "block"]
    assert sorted(table["repeat"].unique()) == [0, 1]
    lattice = grids.Lattice.fit(section.obsm["spatial"])
    hidden = grids.hold_out(section.obsm["spatial"], 0.5, block=3 * lattice.pitch, random_state=2)
    adata = section.copy()
    genes = by_gene(table[(table["split"] == "block") & (table["repeat"] == 1)], "idw", "mse").index
    tl.fit(adata, "idw", train_on=~hidden, genes=genes)
    tl.predict(adata)
    cut = adata[hidden, genes]
    expected = ((cut.X.toarray() - cut.layers["sthisto"]) ** 2).mean(axis=0)
    found = by_gene(table[(table["split"] == "block") & (table["repeat"] == 1)], "idw", "mse")
    assert_allclose(found, expected, rtol=1e-3)


def test_same_seed_same_table_and_another_seed_another(section):
    tables = [evaluate(section.copy(), "attention", random_state=random_state) for random_state in (5, 5, 6)]
    scores = [table[~table["metric"].isin(["seconds", "peak_memory_mb"])].reset_index(drop=True) for table in tables]
    pd.testing.assert_frame_equal(scores[0], scores[1])
    assert mean(tables[0], "attention") != mean(tables[2], "attention")


def test_several_sections_are_fitted_together_and_scored_apart(sections):
    table = evaluate(sections, "ridge", library_key="library", genes=12)
    assert list(table["section"].dropna().unique()) == ["synthetic_0", "synthetic_1"]
    costs = table[table["metric"] == "seconds"]
    assert len(costs) == 1
    assert costs["section"].isna().all()
    first = sections[sections.obs["library"] == "synthetic_0"].copy()
    alone = evaluate(first, "ridge", library_key="library", genes=sections.var_names)
    together = evaluate(sections, "ridge", library_key="library", genes=sections.var_names)
    assert_allclose(
        mean(alone, "gene mean", "mse"), mean(together, "gene mean", "mse", section="synthetic_0"), rtol=1e-6
    )
    assert mean(alone, "ridge") != mean(together, "ridge", section="synthetic_0")


# --- genes -----------------------------------------------------------------------------------------------------------


def test_genes_are_chosen_as_scanpy_does_among_those_seen_often_enough():
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(rng.gamma(0.3, 2, 80) * rng.gamma(1, 1, (60, 80))))
    seen = np.asarray((counts > 0).mean(axis=0)).ravel() >= 0.1
    assert 20 < seen.sum() < 80
    adata = sc.AnnData(counts[:, seen])
    sc.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=20)
    chosen = choose_genes(counts, np.zeros(60), 20)
    assert_array_equal(chosen[seen], adata.var["highly_variable"])
    assert not chosen[~seen].any()
    assert_array_equal(choose_genes(counts, np.zeros(60), 80), seen)


@pytest.mark.parametrize(("sizes", "least"), [((1100,), 0), ((1100, 800), 0.1), ((100,), 0.1)])
def test_large_sections_tell_of_rare_genes(sizes, least):
    rng = np.random.default_rng(0)
    sections = [Section(name=str(n), xy=rng.uniform(size=(n, 2))) for n in sizes]
    counts = [sparse.csr_matrix(rng.poisson([3, 0.5, 0.05, 0], (n, 4))) for n in sizes]
    measured = Dataset(sections=sections, expression=counts, genes=np.array(list("abcd")), counts=counts)
    hidden = [np.arange(n) % 2 == 0 for n in sizes]
    assert measured.split(hidden, n_genes=9).genes == (["a", "b"] if least else ["a", "b", "c"])


def test_too_few_genes_to_rank_are_refused_with_a_way_out(sections, refuses):
    with refuses(sections, ValueError, r"12 genes on 60 training spots are too few .* Pass genes=12 to take them"):
        evaluate(sections, "ridge", library_key="library")


def test_nothing_is_written(section, refuses):
    before = section.copy()
    evaluate(section, "attention")
    pd.testing.assert_frame_equal(section.var, before.var)
    pd.testing.assert_frame_equal(section.obs, before.obs)
    assert (section.X != before.X).nnz == 0
    assert (section.layers["counts"] != before.layers["counts"]).nnz == 0
    assert_array_equal(section.obsm["X_histo"], before.obsm["X_histo"])
    for slot in ("layers", "obsm", "uns"):
        assert list(getattr(section, slot)) == list(getattr(before, slot))
    assert list(section.uns["sthisto"]) == ["features"]


def test_models_by_name_with_params_and_a_numpy_seed(section):
    one = evaluate(section, {"idw": {"n_neighbors": 3}, "ridge": None}, random_state=np.int64(1))
    assert set(one["model"]) == {"idw", "ridge", "gene mean", "ceiling"}
    assert mean(one, "idw") != mean(evaluate(section, random_state=1), "idw")
    assert mean(one, "ridge") == mean(evaluate(section, "ridge", random_state=1), "ridge")


# --- the paper's score -----------------------------------------------------------------------------------------------


def test_the_score_over_all_spots_has_its_own_name_and_rewards_copying(section):
    table = evaluate(section, "idw", split=AllSpotsSplit(), random_state=2)
    hidden = grids.hold_out(section.obsm["spatial"], 0.5, random_state=2)
    assert {m for m in table["metric"].unique() if not m.endswith("_all_spots")} == {"seconds", "peak_memory_mb"}
    assert set(table["model"]) == {"idw", "gene mean", "training values"}
    assert set(table["genes"]) == {"all spots"}
    genes = by_gene(table, "idw", "mse_all_spots").index
    truth = section[:, genes].X.toarray()
    copied = np.where(hidden[:, None], truth[~hidden].mean(axis=0), truth)
    expected = [stats.pearsonr(t, c)[0] for t, c in zip(truth.T, copied.T, strict=True)]
    assert_allclose(by_gene(table, "training values", "pearson_all_spots"), expected, rtol=1e-4)
    assert mean(table, "idw", "pearson_all_spots") > mean(evaluate(section, "idw", random_state=2), "idw") + 0.05
    chosen = choose_genes(section.layers["counts"], np.zeros(section.n_obs), 8)
    assert list(genes) == list(section.var_names[chosen])


# --- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not evaluation.MEMORY.exists(), reason="this system has no /proc")
@pytest.mark.parametrize("megabytes", [0, 300])
def test_memory_that_a_fit_takes_is_seen_though_it_is_given_back(megabytes):
    class Large(Spy):
        def fit(self, sections, **options):
            np.ones((megabytes, 2**17)).sum()
            return super().fit(sections, **options)

    trial = Split(sections=[thirty_spots()], held_out=[np.arange(30) < 10], genes=["x", "y"])
    costs = trial.run("large", Large(), random_state=0, device="cpu").set_index("metric")["value"]
    assert abs(costs["peak_memory_mb"] - megabytes) < 40
    assert 0 < costs["seconds"] < 30


def test_where_memory_cannot_be_read_it_is_nan(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "MEMORY", tmp_path / "statm")
    trial = Split(sections=[thirty_spots()], held_out=[np.arange(30) < 10], genes=["x", "y"])
    costs = trial.run("spy", Spy(), random_state=0, device="cpu").set_index("metric")["value"]
    assert np.isnan(costs["peak_memory_mb"])


# --- comparison ------------------------------------------------------------------------------------------------------


def scores(values, split="random", section="s"):
    rows = [(model, i, value) for model, each in values.items() for i, value in enumerate(each)]
    table = pd.DataFrame(rows, columns=["model", "repeat", "value"])
    return table.assign(split=split, section=section, gene=np.nan, metric="pearson", genes="given")


@given(random_state=st.integers(0, 999), n=st.integers(2, 12), confidence=st.floats(0.5, 0.99))
@settings(max_examples=30, deadline=None)
def test_the_interval_is_that_of_a_paired_t_test(random_state, n, confidence):
    a, b = np.random.default_rng(random_state).normal(size=(2, n))
    a += 0.5
    table = scores({"a": a, "b": b, "ceiling": np.ones(n)}).sample(
        frac=1, random_state=random_state
    )  # order does not matter
    [row] = compare(table, confidence=confidence).to_dict("records")
    sign = 1 if row["model"] == "a" else -1
    expected = stats.ttest_rel(a, b).confidence_interval(confidence)
    assert {row["model"], row["other"]} == {"a", "b"}
    assert_allclose(sorted([sign * row["low"], sign * row["high"]]), expected, rtol=1e-6, atol=1e-9)
    assert_allclose(sign * row["difference"], (a - b).mean(), atol=1e-12)
    assert row["n"] == n


def test_pairs_are_of_one_split_and_section():
    parts = [scores({"a": [0.5, 0.6], "b": [0.1, 0.2]}, split, library) for split in "xy" for library in "st"]
    parts[3]["value"] += [0, 0, 1, 1]
    found = compare(pd.concat(parts))
    assert found["n"].tolist() == [4, 4]
    assert_allclose(found["difference"], [0.4, -0.1])
    assert found["high"][0] - found["low"][0] < 1e-9 < found["high"][1] - found["low"][1]


def test_one_pair_has_no_interval():
    [row] = compare(scores({"a": [0.5], "b": [0.2]})).to_dict("records")
    assert row["difference"] == pytest.approx(0.3)
    assert np.isnan([row["low"], row["high"]]).all()


def test_costs_can_be_compared(section):
    found = compare(evaluate(section, ("attention", "idw"), n_repeats=2), "seconds")
    assert found["n"].tolist() == [2]


def test_what_cannot_be_compared_is_refused():
    table = scores({"a": [0.5], "b": [0.2]})
    with pytest.raises(KeyError, match=r"no metric 'r' in the table \(there are: pearson\)"):
        compare(table, "r")
    with pytest.raises(ValueError, match="two models or more; the table has a"):
        compare(table[table["model"] == "a"])
    with pytest.raises(ValueError, match="add a column that identifies the section"):
        compare(pd.concat([table, table]))
    with pytest.raises(ValueError, match="confidence=95"):
        compare(table, confidence=95)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"models": "magic"}, KeyError, r"no model 'magic' \(there are: attention"),
        ({"models": ()}, ValueError, "no model to evaluate"),
        ({"split": "half"}, ValueError, "split='half': expected 'random', 'block', both"),
        ({"split": ()}, ValueError, "expected 'random', 'block'"),
        ({"genes": 0}, ValueError, "genes=0: expected names, or a whole number"),
        ({"genes": True}, ValueError, "genes=True: expected names"),
        ({"counts_layer": None}, ValueError, "genes=8: genes are chosen by counts"),
        (
            {"split": RandomSplit(fraction=0.95)},
            ValueError,
            r"too few spots .*'synthetic_0': 95 held out, 5 left.*20 left in all",
        ),
        ({"split": RandomSplit(fraction=0.05)}, ValueError, r"5 held out, 95 left.*needs 10 held out"),
        ({"n_repeats": 0}, ValueError, "n_repeats=0"),
        ({"split": BlockSplit(block=0)}, ValueError, "block"),
        ({"split": BlockSplit(block=99)}, ValueError, "one block of side 99"),
        ({"counts_layer": "raw"}, KeyError, r"no layer 'raw' in adata \(found: 'counts', 'logs'\)"),
        ({"counts_layer": "logs"}, ValueError, "layers\\['logs'\\] holds no raw counts"),
        ({"layer": "logs"}, ValueError, "layer='logs' and counts_layer='counts'"),
        ({"counts_layer": None, "genes": None, "layer": "counts"}, ValueError, "seems to hold raw counts"),
        ({"models": {"idw": {"k": 3}}}, ValueError, "model 'idw' has no params k"),
        ({"genes": ["nonesuch"]}, KeyError, "not in adata.var_names: 'nonesuch'"),
        ({"models": "ridge", "features_key": "X_uni"}, KeyError, "no image features 'X_uni'"),
        ({"library_key": "slide"}, KeyError, "no column 'slide'"),
    ],
)
def test_mistakes_are_told_and_change_nothing(section, refuses, options, error, match):
    section.layers["logs"] = section.X.copy()
    with refuses(section, error, match):
        evaluate(section, **options)


def test_every_section_needs_spots(sections, refuses):
    few = sections[np.r_[0:60, 60:75]].copy()
    with refuses(few, ValueError, "'synthetic_1': 8 held out, 7 left"):
        evaluate(few, library_key="library")


def test_genes_that_nobody_sees_are_refused(section, refuses):
    section.layers["counts"] = sparse.csr_matrix(section.shape)
    with refuses(section, ValueError, "no gene is seen in 10% of the 50 training spots"):
        evaluate(section)


# --- from files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(section, tmp_path):
    section.X = section.layers.pop("counts")
    section.write_h5ad(tmp_path / "section.h5ad")
    return tmp_path / "section.h5ad"


def test_the_command_writes_and_tells_what_the_function_gives(section, file, capsys):
    scores, picture = file.with_name("scores.csv"), file.with_name("scores.png")
    options = ["--models", "ridge,idw", "--repeats", "2", "--seed", "3", "--device", "cpu", "--quiet", "--json"]
    assert main(["evaluate", str(file), "-o", str(scores), "--picture", str(picture), *options]) == 0
    told = json.loads(capsys.readouterr().out)
    section.layers["counts"] = section.X
    expected = tl.evaluate(section, ("ridge", "idw"), n_repeats=2, counts_layer="counts", random_state=3)
    found = pd.read_csv(scores)
    costs = ["seconds", "peak_memory_mb"]
    tables = [table[~table["metric"].isin(costs)].reset_index(drop=True) for table in (found, expected)]
    pd.testing.assert_frame_equal(*tables, check_dtype=False)
    assert set(told["pearson"]) == {"random", "block"}
    assert told["pearson"]["block"]["idw"] == pytest.approx(mean(expected, "idw", split="block"))
    assert told["genes"] == "each training half"
    assert picture.stat().st_size > 10_000


def test_the_command_takes_expression_as_it_is_where_there_are_no_counts(section, file, capsys):
    section.X = metrics.lognorm(section.X)
    section.write_h5ad(file)
    assert main(["evaluate", str(file), "--models", "idw", "--split", "random", "--repeats", "1"]) == 0
    out, err = capsys.readouterr()
    assert "genes: given" in out
    assert "ceiling" not in out
    assert "no raw counts" in err


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--models", "magic"], "--models magic: there: 'attention'"),
        (["--fraction", "2"], "fraction should be between 0 and 1"),
        (["-o", "scores.txt"], "should end in .csv"),
    ],
)
def test_the_command_tells_mistakes_in_one_line(file, capsys, options, match):
    assert main(["evaluate", str(file), "--models", "idw", "--quiet", *options]) == 2
    assert match in capsys.readouterr().err


# --- real data -------------------------------------------------------------------------------------------------------


def test_on_a_real_section_distance_beats_the_mean_and_no_one_the_noise(data):
    adata = sc.read_h5ad(data("her2st/C2.h5ad"))
    adata.layers["counts"] = adata.X
    table = evaluate(adata, "idw", genes=300, split=("random", "block"))
    for split in ("random", "block"):
        assert 0.02 < mean(table, "idw", split=split) < mean(table, "ceiling", split=split) < 0.9
    assert mean(table, "idw", split="random") > mean(table, "idw", split="block")


def test_repeats_are_numbered_and_differ():
    adata = datasets.synthetic(n_spots=60, n_genes=10)
    pp.extract_features(adata)
    report = tl.evaluate(adata, ["idw"], split="random", n_repeats=2)
    means = evaluation.gene_means(report, "pearson").query("model == 'idw'").set_index("repeat")["value"]
    assert list(means.index) == [0, 1]
    assert means[0] != means[1]


def test_genes_of_a_shallow_section_can_be_ranked():
    """Thousands of genes seen in one or two spots have the same mean and variance, on which the regression fails."""
    random = np.random.default_rng(0)
    counts = np.zeros((1200, 3000), dtype=np.float32)
    counts[random.integers(0, 1200, 2970), np.arange(2970)] = 1
    counts[:, 2970:] = random.poisson(random.uniform(0.5, 3, 30), (1200, 30))
    chosen = choose_genes(sparse.csr_matrix(counts), np.zeros(1200), 20, least_seen=0.0)
    assert 20 <= chosen.sum() <= 30
    assert chosen[2970:].sum() == chosen.sum()


@pytest.mark.parametrize("kind", [RandomSplit, BlockSplit, AllSpotsSplit])
@pytest.mark.parametrize("fraction", [0, 1, 1.5, -0.1])
def test_splits_hold_out_some_spots_and_leave_some(kind, fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        kind(fraction=fraction)

"""The commands on files: the same as the functions, reuse of what is there, and one line for every mistake."""

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from scipy import sparse
from scipy.stats import pearsonr

import sthisto
from sthisto.cli import _commands, main
from sthisto.cli._steps import params_in

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def section():
    return sthisto.datasets.synthetic(40, n_genes=20)


@pytest.fixture
def path(section, tmp_path):
    """Log-normalised, with its picture in the table."""
    section.write_h5ad(tmp_path / "section.h5ad")
    return tmp_path / "section.h5ad"


@pytest.fixture(scope="module")
def described(section, tmp_path_factory):
    """With features as well."""
    path = tmp_path_factory.mktemp("described") / "section.h5ad"
    adata = section.copy()
    sthisto.pp.extract_features(adata)
    adata.write_h5ad(path)
    return path


def counts_table(n_spots=64, n_genes=1500, random_state=0):
    """Raw counts on a square array, genes of very different levels."""
    random = np.random.default_rng(random_state)
    level = 10 ** random.uniform(-1.8, 1.5, n_genes)
    counts = random.poisson(level * random.gamma(2, 0.5, (n_spots, n_genes)))
    side = int(np.ceil(np.sqrt(n_spots)))
    xy = np.indices((side, side)).reshape(2, -1).T[:n_spots] * 100.0
    adata = ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obsm={"spatial": xy})
    adata.var_names = [f"g{i}" for i in range(n_genes)]
    return adata


def run(*argv):
    """Exit code, with paths as they are."""
    return main([str(each) for each in argv])


def told(capsys, *argv):
    """The summary of a command that succeeds."""
    assert run(*argv, "--json") == 0
    return json.loads(capsys.readouterr().out)


# --- the same as the functions ---------------------------------------------------------------------------------------


def test_features_are_those_of_the_function(path, section, tmp_path, capsys):
    summary = told(capsys, "features", path, "-o", tmp_path / "out.h5ad", "--patch-um", 200)
    expected = section.copy()
    sthisto.pp.extract_features(expected, patch_um=200)
    made = ad.read_h5ad(tmp_path / "out.h5ad")
    assert_array_equal(made.obsm["X_histo"], expected.obsm["X_histo"])
    assert_array_equal(made.X.toarray(), section.X.toarray())
    assert (summary["spots"], summary["features"]) == expected.obsm["X_histo"].shape


def test_a_fit_is_that_of_the_function_in_both_files(described, tmp_path, capsys):
    out, alone = tmp_path / "out.h5ad", tmp_path / "fit.safetensors"
    options = ["--model", "ridge", "--genes", "fine_01,region_00", "--params", "n_components=5", "--seed", 7]
    summary = told(capsys, "fit", described, "-o", out, "--save", alone, *options)
    assert summary["output"] == [str(out), str(alone)]
    assert summary["genes"] == 2
    assert summary["reused"] == [f"obsm['X_histo'] of {described}"]
    expected = ad.read_h5ad(described)
    params, genes = {"n_components": 5}, ["fine_01", "region_00"]
    sthisto.tl.fit(expected, "ridge", genes=genes, params=params)
    sthisto.tl.predict(expected)
    made = ad.read_h5ad(out)
    assert made.uns["sthisto"]["fit"]["sthisto"]["random_state"] == 7
    sthisto.tl.predict(made)
    assert_array_equal(made.layers["sthisto"], expected.layers["sthisto"])
    sthisto.tl.load(alone, adata := ad.read_h5ad(described))
    sthisto.tl.predict(adata)
    assert_array_equal(adata.layers["sthisto"], expected.layers["sthisto"])


def test_upsample_is_that_of_the_function(path, section, tmp_path, capsys):
    summary = told(capsys, "upsample", path, "-o", tmp_path / "dense.h5ad", "--model", "ridge", "--grid", 2)
    expected = section.copy()
    sthisto.pp.extract_features(expected)
    sthisto.tl.fit(expected, "ridge")
    expected = sthisto.tl.upsample(expected, 2)
    dense = ad.read_h5ad(tmp_path / "dense.h5ad")
    assert_array_equal(dense.X, expected.X)
    assert_array_equal(dense.obsm["spatial"], expected.obsm["spatial"])
    assert list(dense.obs_names) == list(expected.obs_names)
    assert summary["points"] == dense.n_obs > 2.5 * summary["spots"]
    assert summary["reused"] == []
    assert set(summary["seconds"]) == {"read", "features", "fit", "upsample", "write"}


def test_pictures_by_section(tmp_path, capsys):
    adata = sthisto.datasets.synthetic(50, n_genes=10, n_sections=2)
    expected = adata.copy()
    sthisto.pp.extract_features(expected, library_key="library")
    images = []
    for name, entry in adata.uns.pop("spatial").items():
        Image.fromarray(entry["images"]["hires"]).save(tmp_path / f"{name}.png")
        images += ["--image", f"{name}={tmp_path / name}.png"]
    adata.write_h5ad(tmp_path / "two.h5ad")
    told(capsys, "features", tmp_path / "two.h5ad", "-o", tmp_path / "out.h5ad", "--library-key", "library", *images)
    made = ad.read_h5ad(tmp_path / "out.h5ad")
    assert_allclose(made.obsm["X_histo"], expected.obsm["X_histo"], atol=1e-4)
    assert list(made.uns["sthisto"]["features"]["X_histo"]["image"]) == [
        each.partition("=")[2] for each in images[1::2]
    ]


def test_bounds_of_new_measurements(path, section, tmp_path, capsys):
    told(capsys, "upsample", path, "-o", tmp_path / "dense.h5ad", "--model", "idw", "--grid", 1, "--interval", 0.9)
    expected = section.copy()
    sthisto.tl.fit(expected, "idw")
    expected = sthisto.tl.upsample(expected, 1, interval=0.9)
    dense = ad.read_h5ad(tmp_path / "dense.h5ad")
    for layer in ("low", "high"):
        assert_array_equal(dense.layers[layer], expected.layers[layer])
    assert (dense.layers["low"] <= dense.layers["high"]).all()


def test_genes_are_tested_and_the_map_keeps_spot_means(path, section, tmp_path, capsys):
    options = "--model", "ridge", "--test-genes", "--match-spot-means"
    told(capsys, "upsample", path, "-o", tmp_path / "dense.h5ad", *options)
    expected = section.copy()
    sthisto.pp.extract_features(expected)
    sthisto.tl.fit(expected, "ridge")
    sthisto.tl.test_genes(expected)
    expected = sthisto.tl.upsample(expected, 2, match_spot_means=True)
    dense = ad.read_h5ad(tmp_path / "dense.h5ad")
    assert_array_equal(dense.X, expected.X)
    for column in ("sthisto_pearson", "sthisto_qvalue"):
        assert_array_equal(dense.var[column], expected.var[column])
    assert dense.var["sthisto_pearson"].notna().all()


def test_no_features_for_a_model_that_reads_none(path, tmp_path, capsys):
    summary = told(capsys, "upsample", path, "-o", tmp_path / "dense.h5ad", "--model", "idw")
    assert "features" not in summary["seconds"]
    assert ad.read_h5ad(tmp_path / "dense.h5ad").n_vars == 20


def test_models_that_read_pixels_get_the_picture_and_its_scale(path, tmp_path, section, monkeypatch, capsys):
    Image.fromarray(section.uns["spatial"]["synthetic_0"]["images"]["hires"]).save(tmp_path / "p.png")
    given = {}

    def fit(adata, model, **options):
        given.update(options, made=adata.uns.get("sthisto", {}).get("features"))
        raise ValueError("seen enough")

    monkeypatch.setattr(sthisto.tl, "fit", fit)
    arguments = ["fit", path, "-o", tmp_path / "o.h5ad", "--model", "stnet", "--image", tmp_path / "p.png"]
    assert run(*arguments) == 2
    assert (given["image"], given["made"]) == (str(tmp_path / "p.png"), None)
    assert run(*arguments, "--mpp", 2.1) == 2
    assert given["made"]["X_histo"]["mpp"] == pytest.approx([2.1])


# --- reuse -----------------------------------------------------------------------------------------------------------


def test_upsample_reuses_a_fit_unless_told_otherwise(described, tmp_path, capsys):
    fitted, dense = tmp_path / "fitted.h5ad", tmp_path / "dense.h5ad"
    told(capsys, "fit", described, "-o", fitted, "--model", "ridge")
    again = told(capsys, "upsample", fitted, "-o", dense)
    assert again["model"] == "ridge"
    assert again["reused"] == [f"the fitted model in {fitted}"]
    assert "fit" not in again["seconds"]
    assert run("upsample", fitted, "-o", dense, "--model", "idw") == 0
    assert "fitting again, as --model is given" in capsys.readouterr().err
    other = told(capsys, "upsample", fitted, "-o", dense, "--model", "ridge", "--patch-um", 150)
    assert other["reused"] == []
    assert {"features", "fit"} <= set(other["seconds"])


# --- raw counts ------------------------------------------------------------------------------------------------------


def test_counts_are_normalised_as_scanpy_does(tmp_path, capsys):
    adata = counts_table()
    adata.write_h5ad(tmp_path / "counts.h5ad")
    assert run("fit", tmp_path / "counts.h5ad", "-o", tmp_path / "out.h5ad", "--model", "idw") == 0
    error = capsys.readouterr().err
    seen = np.asarray((adata.X > 0).sum(axis=0)).ravel() >= 6.4
    assert 1000 < seen.sum() < 1500
    assert "raw counts" in error
    assert "1000 of 1500 genes chosen: seen in 10% of the spots, then by variance" in error

    expected = adata.copy()
    sc.pp.normalize_total(expected, target_sum=1e4)
    sc.pp.log1p(expected)
    common = adata[:, seen].copy()
    sc.pp.highly_variable_genes(common, flavor="seurat_v3", n_top_genes=1000)
    made = ad.read_h5ad(tmp_path / "out.h5ad")
    assert_allclose(made.X.toarray(), expected.X.toarray(), rtol=1e-5)
    assert_array_equal(made.layers["counts"].toarray(), adata.X.toarray())
    assert set(made.var_names[made.var["highly_variable"]]) == set(common.var_names[common.var["highly_variable"]])
    assert set(made.uns["sthisto"]["fit"]["sthisto"]["genes"]) == set(made.var_names[made.var["highly_variable"]])


@pytest.mark.parametrize(("n_spots", "everything"), [(1000, False), (1001, True)])
def test_rare_genes_count_where_there_are_many_spots(tmp_path, n_spots, everything):
    adata = counts_table(n_spots, 40)
    adata.write_h5ad(tmp_path / "counts.h5ad")
    assert run("fit", tmp_path / "counts.h5ad", "-o", tmp_path / "out.h5ad", "--model", "idw") == 0
    chosen = ad.read_h5ad(tmp_path / "out.h5ad").var["highly_variable"].to_numpy()
    seen = np.asarray((adata.X > 0).mean(axis=0)).ravel() >= 0.1
    assert not seen.all()
    assert_array_equal(chosen, np.ones(40, dtype=bool) if everything else seen)


def test_sections_choose_genes_together(tmp_path, capsys):
    adata = counts_table(128)
    adata.obsm["spatial"] = np.tile(adata.obsm["spatial"][:64], (2, 1))
    adata.obs["slide"] = pd.Categorical(np.repeat(["a", "b"], 64))
    adata.write_h5ad(tmp_path / "counts.h5ad")
    out = tmp_path / "out.h5ad"
    told(capsys, "fit", tmp_path / "counts.h5ad", "-o", out, "--model", "idw", "--library-key", "slide")
    common = adata[:, np.asarray((adata.X > 0).mean(axis=0)).ravel() >= 0.1].copy()
    sc.pp.highly_variable_genes(common, flavor="seurat_v3", n_top_genes=1000, batch_key="slide")
    made = ad.read_h5ad(out)
    assert set(made.var_names[made.var["highly_variable"]]) == set(common.var_names[common.var["highly_variable"]])


def test_normalised_expression_is_left_alone(path, section, tmp_path):
    assert run("fit", path, "-o", tmp_path / "out.h5ad", "--model", "idw") == 0
    made = ad.read_h5ad(tmp_path / "out.h5ad")
    assert_array_equal(made.X.toarray(), section.X.toarray())
    assert "highly_variable" not in made.var
    assert len(made.uns["sthisto"]["fit"]["sthisto"]["genes"]) == 20


def test_counts_beside_normalised_layers_are_not_guessed(section, tmp_path, capsys):
    adata = section.copy()
    adata.layers["logcounts"], adata.X = adata.X, adata.layers["counts"]
    source, out = tmp_path / "both.h5ad", tmp_path / "out.h5ad"
    adata.write_h5ad(source)
    assert run("fit", source, "-o", out, "--model", "idw") == 2
    assert "--layer logcounts, or --layer X" in capsys.readouterr().err
    for layer in ("logcounts", "X"):
        assert run("fit", source, "-o", out, "--model", "idw", "--layer", layer) == 0
        made = ad.read_h5ad(out)
        assert made.uns["sthisto"]["fit"]["sthisto"]["layer"] == ("" if layer == "X" else layer)
        untouched = np.array_equal(made.X.toarray(), adata.X.toarray())
        assert untouched == (layer == "logcounts")


def test_genes_marked_before_are_kept(tmp_path, capsys):
    adata = counts_table(64, 30)
    adata.var["highly_variable"] = np.arange(30) % 2 == 0
    adata.write_h5ad(tmp_path / "counts.h5ad")
    summary = told(capsys, "fit", tmp_path / "counts.h5ad", "-o", tmp_path / "out.h5ad", "--model", "idw")
    assert summary["genes"] == 15
    assert summary["reused"] == [f"var['highly_variable'] of {tmp_path / 'counts.h5ad'}"]


def test_genes_from_a_file(path, tmp_path, capsys):
    (tmp_path / "genes.txt").write_text("# markers\nfine_01\n\n region_00 \n")
    summary = told(capsys, "fit", path, "-o", tmp_path / "o.h5ad", "--model", "idw", "--genes", tmp_path / "genes.txt")
    assert summary["genes"] == 2


def test_repeated_gene_names_are_made_unique(tmp_path, capsys):
    adata = counts_table(64, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.var_names = ["TBCE", "TBCE", *adata.var_names[2:]]
        adata.write_h5ad(tmp_path / "counts.h5ad")
    assert run("fit", tmp_path / "counts.h5ad", "-o", tmp_path / "out.h5ad", "--model", "idw") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert lines == ["sthisto: warning: 1 gene names repeat others (first: 'TBCE'); they were made unique by a number."]
    assert list(ad.read_h5ad(tmp_path / "out.h5ad").var_names[:2]) == ["TBCE", "TBCE-1"]


def test_a_real_section(tmp_path, capsys):
    source = DATA / "mob" / "MOB1.h5ad"
    if not source.is_file():
        pytest.skip("the real sections are not here")
    summary = told(capsys, "upsample", source, "-o", tmp_path / "dense.h5ad", "--model", "idw")
    assert summary["spots"] == 379
    assert ad.read_h5ad(tmp_path / "dense.h5ad").X.max() < np.log1p(1e4)


# --- pictures and the demo -------------------------------------------------------------------------------------------


def test_a_picture_of_genes(described, tmp_path, capsys):
    picture = tmp_path / "genes.png"
    arguments = ["upsample", described, "-o", tmp_path / "d.h5ad", "--model", "idw", "--picture", picture]
    summary = told(capsys, *arguments, "--show", "region_00,fine_01")
    assert summary["picture"] == str(picture)
    with Image.open(picture) as drawn:
        one_row = drawn.size
    told(capsys, *arguments, "--show", "region_00")
    with Image.open(picture) as drawn:
        assert drawn.size[1] < one_row[1]


def test_the_demo_scores_hidden_spots_only(tmp_path, capsys, monkeypatch):
    small = sthisto.datasets.synthetic(50, n_genes=20)
    monkeypatch.setattr(sthisto.datasets, "synthetic", lambda random_state: small.copy())
    monkeypatch.setattr(_commands, "MODEL", "ridge")
    folder = tmp_path / "new" / "demo"
    assert run("demo", "-o", folder, "--quiet") == 0
    table = capsys.readouterr().out.splitlines()
    scores = {row.split()[0]: [float(each) for each in row.split()[1:]] for row in table[2:4]}
    expected = small.copy()
    hidden = sthisto.grids.hold_out(expected.obsm["spatial"], 0.5, random_state=0)
    expected.obs["kept"] = ~hidden
    expected.X = np.where(hidden[:, None], 1.5, small.X.toarray())  # what is hidden cannot matter
    sthisto.tl.fit(expected, "idw", train_on="kept")
    sthisto.tl.predict(expected)
    assert table[0].startswith(f"Pearson r on {hidden.sum()} hidden spots")
    assert set(scores) == {"ridge", "idw"}
    goals = small.X.toarray(), sthisto.datasets.synthetic_truth(small)
    for score, values in zip(scores["idw"], goals, strict=True):
        pairs = zip(values[hidden].T, expected.layers["sthisto"][hidden].T, strict=True)
        r = [pearsonr(true, guess)[0] for true, guess in pairs if np.ptp(true) > 0]
        assert score == pytest.approx(np.mean(r), abs=6e-4)
    assert table[4].startswith(f"{folder / 'dense.h5ad'}: {ad.read_h5ad(folder / 'dense.h5ad').n_obs} points")
    assert (folder / "dense.png").stat().st_size > 10_000


# --- mistakes --------------------------------------------------------------------------------------------------------


def without(slot, key):
    """Break a section by taking something out."""

    def broken(adata):
        del getattr(adata, slot)[key]

    return broken


def scaled(adata):
    adata.X = adata.X.toarray() - 1


MISTAKES = {
    "no_file": ("upsample nowhere.h5ad -o d.h5ad", None, "no file or folder nowhere.h5ad"),
    "not_h5ad": ("upsample text.h5ad -o d.h5ad", None, "text.h5ad is not an h5ad file"),
    "other_hdf5": ("upsample matrix.h5ad -o d.h5ad", None, "matrix.h5ad is a feature-barcode matrix alone"),
    "no_coordinates": ("features s.h5ad -o d.h5ad", without("obsm", "spatial"), "no spot coordinates"),
    "no_image": ("upsample s.h5ad -o d.h5ad --model ridge", without("uns", "spatial"), "Pass --image with the"),
    "lost_image": ("features s.h5ad -o d.h5ad --image lost.jpg", None, "lost.jpg"),
    "small_image": ("features s.h5ad -o d.h5ad --image small.png", None, "is blank"),
    "no_image_file": ("features s.h5ad -o d.h5ad --image text.h5ad", None, "text.h5ad"),
    "two_images": ("features s.h5ad -o d.h5ad --image a.png --image b.png", None, "SECTION=FILE"),
    "scale": ("features s.h5ad -o d.h5ad --mpp 9", None, "9 um/px"),
    "gene": ("upsample s.h5ad -o d.h5ad --genes region_00,nope", None, "'nope'"),
    "gene_file": ("fit s.h5ad -o d.h5ad --genes lost.txt", None, "no file lost.txt"),
    "no_gene": ("fit s.h5ad -o d.h5ad --genes ,", None, "no gene in"),
    "shown_gene": ("upsample s.h5ad -o d.h5ad --picture p.png --show nope", None, "'nope'"),
    "unmodelled": ("upsample s.h5ad -o d.h5ad --genes fine_01 --picture p.png --show region_00", None, "--genes"),
    "half_asked": ("upsample s.h5ad -o d.h5ad --show region_00", None, "name the file with --picture"),
    "layer": ("fit s.h5ad -o d.h5ad --model idw --layer nope", None, "no layer 'nope'"),
    "param": ("fit s.h5ad -o d.h5ad --model idw --params nope=1", None, "has no params nope"),
    "param_form": ("fit s.h5ad -o d.h5ad --model idw --params nope", None, "expected NAME=VALUE"),
    "param_kind": (
        "fit s.h5ad -o d.h5ad --model idw --params n_neighbors=many",
        None,
        "n_neighbors is 'many', but has to",
    ),
    "param_float": ("fit s.h5ad -o d.h5ad --model gp --params n_factors=1.5", None, "n_factors is 1.5, but has to be"),
    "param_range": ("fit s.h5ad -o d.h5ad --model idw --params n_neighbors=0", None, "n_neighbors is 0, but has to be"),
    "device": ("fit s.h5ad -o d.h5ad --model idw --device banana", None, "banana is none of cpu, cuda"),
    "no_gpu": ("fit s.h5ad -o d.h5ad --model idw --device cuda:99", None, "device 'cuda:99' is not there"),
    "models": ("evaluate s.h5ad --models ridge,attentoin", None, "did you mean 'attention'"),
    "near_gene": ("fit s.h5ad -o d.h5ad --model idw --genes regoin_00", None, "did you mean 'region_00'"),
    "fraction": ("evaluate s.h5ad --fraction 2", None, "2"),
    "scaled": ("upsample s.h5ad -o d.h5ad", scaled, "has negative values"),
    "library": ("fit s.h5ad -o d.h5ad --model idw --library-key nope", None, "no column 'nope'"),
    "nowhere": ("fit s.h5ad", None, "name a section to write with -o"),
    "no_folder": ("fit s.h5ad --save lost/fit.safetensors", None, "no folder lost"),
    "suffix": ("upsample s.h5ad -o dense.csv", None, "should end in .h5ad"),
    "grid": ("upsample s.h5ad -o d.h5ad --grid 0", None, "argument --grid"),
    "interval": ("upsample s.h5ad -o d.h5ad --interval 2", None, "2"),
    "model": ("upsample s.h5ad -o d.h5ad --model nope", None, "invalid choice: 'nope'"),
    "encoder": ("features s.h5ad -o d.h5ad --encoder nope", None, "invalid choice: 'nope'"),
    "command": ("nope", None, "invalid choice: 'nope'"),
}


FEATURES_FIRST = {"no_image", "lost_image", "small_image", "no_image_file", "scale", "no_coordinates"}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(name, section, tmp_path, monkeypatch, capsys):
    argv, spoil, expected = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    adata = section.copy()
    if spoil:
        spoil(adata)
    adata.write_h5ad("s.h5ad")
    Path("text.h5ad").write_text("genes and spots")
    Image.new("RGB", (50, 40), "pink").save("small.png")
    with h5py.File("matrix.h5ad", "w") as file:
        file.create_group("matrix")
    before = sorted(tmp_path.iterdir())
    if name not in FEATURES_FIRST:  # what follows the features is checked before them
        monkeypatch.setattr(sthisto.pp, "extract_features", None)
    try:
        code = main([*argv.split(), *(["--quiet"] if name != "command" else [])])
    except SystemExit as stopped:
        code = stopped.code
    out, error = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert error.count("\n") == 1
    assert error.startswith("sthisto: error: ")
    assert expected in error
    assert not error.startswith(("sthisto: error: '", 'sthisto: error: "'))  # the quotes of KeyError
    assert sorted(tmp_path.iterdir()) == before


def test_from_outside_and_with_debug(tmp_path, capsys):
    arguments = ["upsample", str(tmp_path / "nowhere.h5ad"), "-o", str(tmp_path / "d.h5ad")]
    done = subprocess.run([sys.executable, "-m", "sthisto", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"sthisto: error: no file or folder {tmp_path / 'nowhere.h5ad'}.\n"
    assert main([*arguments, "--debug"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith(done.stderr)


def test_an_interrupted_run(path, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sthisto.tl, "fit", interrupted)
    assert run("fit", path, "-o", tmp_path / "out.h5ad", "--model", "idw") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_is_not_told_as_a_mistake(path, tmp_path, monkeypatch):
    monkeypatch.setattr(sthisto.tl, "fit", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("fit", path, "-o", tmp_path / "out.h5ad", "--model", "idw")


# --- talking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["demo"], ["features"], ["fit"], ["upsample"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: sthisto {' '.join(command)}".strip() in capsys.readouterr().out


def test_warnings_are_single_lines_in_the_words_of_the_command(tmp_path, capsys):
    adata = sthisto.datasets.synthetic(50, n_genes=10, array="square")
    Image.fromarray(adata.uns.pop("spatial")["synthetic_0"]["images"]["hires"]).save(tmp_path / "p.png")
    adata.write_h5ad(tmp_path / "s.h5ad")
    arguments = ["features", tmp_path / "s.h5ad", "--image", tmp_path / "p.png", "-o", tmp_path / "o.h5ad", "--quiet"]
    assert run(*arguments) == 0
    out, error = capsys.readouterr()
    assert error.startswith("sthisto: warning: the image's scale is unknown")
    assert error.endswith("Pass --pitch-um or --mpp.\n")
    assert error.count("\n") == 1
    assert out == f"{tmp_path / 'o.h5ad'}: 50 spots x 102 features\n"
    assert run(*arguments, "--pitch-um", 100) == 0
    assert capsys.readouterr().err == ""


def test_warnings_for_developers_are_not_shown(path, tmp_path, monkeypatch, capsys):
    def warn(*args, **kwargs):
        warnings.warn("soon gone", FutureWarning, stacklevel=1)
        warnings.warn("spots are few\n  in layer= 'x'.", UserWarning, stacklevel=1)
        raise KeyError("stop here")

    monkeypatch.setattr(sthisto.tl, "fit", warn)
    assert run("fit", path, "-o", tmp_path / "out.h5ad", "--model", "idw", "--quiet") == 2
    expected = "sthisto: warning: spots are few in --layer 'x'.\nsthisto: error: stop here\n"
    assert capsys.readouterr().err == expected


def test_logging_and_warnings_are_left_as_they_were(path, tmp_path):
    logger, shown = logging.getLogger("sthisto"), warnings.showwarning
    before = logger.level, list(logger.handlers)
    assert run("fit", path, "-o", tmp_path / "out.h5ad", "--model", "idw") == 0
    assert run("fit", "nowhere.h5ad", "-o", tmp_path / "out.h5ad") == 2
    assert (logger.level, list(logger.handlers)) == before
    assert warnings.showwarning is shown


@pytest.mark.parametrize(
    ("model", "given", "expected"),
    [
        ("idw", ["n_neighbors=5,power=3"], {"n_neighbors": 5, "power": 3}),
        ("idw", ["n_neighbors=5", "power=1.5"], {"n_neighbors": 5, "power": 1.5}),
        ("ridge", ["alphas=[1, 10.5],n_components=7"], {"alphas": [1, 10.5], "n_components": 7}),
        ("gp", ["n_factors=null"], {"n_factors": None}),
    ],
)
def test_settings_of_a_model(model, given, expected):
    assert params_in(model, given) == expected


# --- check -----------------------------------------------------------------------------------------------------------


def test_a_section_on_one_page(path, tmp_path, capsys):
    picture = tmp_path / "spots.png"
    checks = told(capsys, "check", path, "--picture", picture)["checks"]
    status = {each["check"]: each["status"] for each in checks}
    assert (status["image"], status["coordinates"], status["scale"]) == ("ok", "ok", "ok")
    assert picture.stat().st_size > 10_000


def test_contradictions_are_an_exit_code(section, tmp_path, capsys):
    section.obsm["spatial"] = section.obsm["spatial"] + 1e5
    section.write_h5ad(tmp_path / "moved.h5ad")
    assert main(["check", str(tmp_path / "moved.h5ad")]) == 1
    assert "contradictory synthetic_0 coordinates: 40 of 40 points are outside" in capsys.readouterr().out


def test_alignment_is_checked_and_corrected(tmp_path, capsys):
    adata = sthisto.datasets.synthetic(220, random_state=1)
    truth = adata.obsm["spatial"].copy()
    adata.obsm["spatial"] = truth.max(axis=0) - truth
    source, out = tmp_path / "s.h5ad", tmp_path / "out.h5ad"
    adata.write_h5ad(source)
    picture = tmp_path / "alignment.png"
    assert run("check-alignment", source, "--json", "--quiet", "--picture", picture) == 1
    [section] = json.loads(capsys.readouterr().out)["sections"]
    assert (section["verdict"], section["symmetry"]) == ("misaligned", "half turn")
    assert Image.open(picture).width > 500
    assert run("align", source, "-o", out, "--quiet") == 0
    made = ad.read_h5ad(out)
    assert_allclose(made.obsm["spatial_before_align"], adata.obsm["spatial"])
    assert np.abs(made.obsm["spatial"] - truth).mean() < 0.25 * 50
    assert run("check-alignment", out, "--quiet") == 0

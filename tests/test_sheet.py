"""The sample sheet: the same as the functions, made anew only where needed, and mistakes told before the work."""

import json
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from scipy.spatial import KDTree

import sthisto
from sthisto.cli import _batch, main
from sthisto.cli._sheet import Row, changes, read_sheet

SHEET = "section,image,role\na,a.png,measured\nb,b.png,measured\nc,c.png,stained\n"
OPTIONS = ("--mpp", "2", "--model", "ridge", "--grid", "1")  # the picture files do not say their scale


@pytest.fixture(scope="module")
def sections():
    """Three sections of one tissue by their name, with positions and expression alone, and their pictures."""
    whole = sthisto.datasets.synthetic(30, n_genes=12, n_sections=3)
    parts, pictures = {}, {}
    for name, (library, entry) in zip("abc", whole.uns["spatial"].items(), strict=True):
        parts[name] = whole[whole.obs["library"] == library].copy()
        parts[name].uns = {}
        pictures[name] = entry["images"]["hires"]
    return parts, pictures


@pytest.fixture(scope="module")
def files(sections, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, part in sections[0].items():
        part.write_h5ad(folder / f"{name}.h5ad")
        Image.fromarray(sections[1][name]).save(folder / f"{name}.png")
    (folder / "sheet.csv").write_text(SHEET)
    return folder


@pytest.fixture
def folder(files, tmp_path, monkeypatch):
    """A folder with all files and the sheet, where the commands run."""
    shutil.copytree(files, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def run(*argv, sheet="sheet.csv"):
    return main(["batch", sheet, "-o", "out", "--quiet", *OPTIONS, *argv])


def told(capsys, *argv, code=0):
    capsys.readouterr()
    assert run(*argv, "--json") == code
    return json.loads(capsys.readouterr().out)


def by_hand(sections):
    """The measured sections, described and fitted with the functions."""
    parts, pictures = sections
    whole = ad.concat({name: parts[name] for name in "ab"}, label="section", index_unique="-", merge="same")
    images = {name: pictures[name] for name in "ab"}
    sthisto.pp.extract_features(whole, image=images, library_key="section", mpp=2.0)
    sthisto.tl.fit(whole, "ridge", library_key="section")
    return whole, images


def test_maps_are_those_of_the_functions(folder, sections, capsys):
    summary = told(capsys, "--grid", "2", "--interval", "0.8")
    assert summary["failed"] == {}
    assert summary["kept"] == []
    whole, images = by_hand(sections)
    for name in "ab":
        dense = ad.read_h5ad(folder / "out" / f"{name}.h5ad")
        part = whole[whole.obs["section"] == name].copy()
        expected = sthisto.tl.upsample(part, 2, image=images, interval=0.8)
        assert_array_equal(dense.X, expected.X)
        assert set(dense.layers) - {None} == {"std", "low", "high"}  # None: X, since anndata 0.13
        for layer, values in expected.layers.items():
            assert_array_equal(dense.layers[layer], values)
        assert_array_equal(dense.obsm["spatial"], expected.obsm["spatial"])
        assert list(dense.uns["spatial"]) == [name]
        assert summary["made"][name] == dense.n_obs > 2.5 * 30
    stained, pictures = ad.read_h5ad(folder / "out" / "c.h5ad"), {"c": sections[1]["c"]}
    xy = sthisto.images.tissue_points(sthisto.images.open_image(pictures["c"]), 50.0)
    spots = ad.AnnData(obs={"section": ["c"] * len(xy)}, obsm={"spatial": xy})
    sthisto.pp.extract_features(spots, image=pictures, library_key="section", mpp=2.0)
    expected = sthisto.tl.upsample(spots, 2, reference=whole, library_key="section", image=pictures, interval=0.8)
    assert_array_equal(stained.X, expected.X)
    for layer in ("std", "low", "high"):
        assert_array_equal(stained.layers[layer], expected.layers[layer])
    assert not stained.obs["measured"].any()


def test_points_of_a_stained_section_lie_on_its_tissue_as_dense_as_the_others(folder, sections):
    assert run("--grid", "2") == 0
    stained = ad.read_h5ad("out/c.h5ad")
    xy = stained.obsm["spatial"]
    picture = sthisto.images.open_image(sections[1]["c"])
    spots = sthisto.images.tissue_points(picture, 50.0)  # 100 um at 2 um/px
    distance, _ = KDTree(xy).query(spots)
    assert_allclose(distance, 0, atol=1e-9)
    assert_array_equal(np.ptp(stained.obs[["array_col", "array_row"]], axis=0), np.rint(np.ptp(xy, axis=0) / 25))
    assert stained.uns["spatial"]["c"]["scalefactors"]["spot_diameter_fullres"] == pytest.approx(25.0)
    [ax] = sthisto.pl.genes(stained, stained.var_names[0], show=False)
    assert len(ax.collections[0].get_offsets()) == stained.n_obs


def test_a_sheet_may_state_the_scale_of_each_section(folder, sections, capsys):
    """In the sheet, the scale of an image is the same as by an option, and another one is another map."""
    lines = (
        SHEET.replace("role", "role,mpp,pitch_um").replace("measured", "measured,2.0,").replace("stained", "stained,4,")
    )
    Path("scales.csv").write_text(lines)
    options = [each for each in OPTIONS if each not in ("--mpp", "2")]
    assert main(["batch", "scales.csv", "-o", "out", "--quiet", *options]) == 0
    assert ad.read_h5ad("out/fitted.h5ad").n_obs == 60
    coarse = ad.read_h5ad("out/c.h5ad").n_obs
    Path("scales.csv").write_text(lines.replace(",4,", ",2,"))
    capsys.readouterr()
    assert main(["batch", "scales.csv", "-o", "out", *options]) == 0
    assert "section c is made again, as its files changed" in capsys.readouterr().err
    assert ad.read_h5ad("out/c.h5ad").n_obs < coarse


def test_a_stained_section_with_places_gets_the_grid_of_upsample(folder, sections):
    lines = SHEET.replace("role", "role,table").replace("measured", "measured,").replace("stained", "stained,c.h5ad")
    Path("places.csv").write_text(lines)
    assert run("--grid", "2", sheet="places.csv") == 0
    xy = sections[0]["c"].obsm["spatial"]
    own = sthisto.grids.Lattice.fit(xy)
    fine = own.refine(2)
    expected = fine.points(fine.cover(xy, 1.1 * own.reach))
    assert_array_equal(ad.read_h5ad("out/c.h5ad").obsm["spatial"], expected)


def test_pictures_may_be_in_the_tables(folder, sections, capsys):
    for name in "ab":
        part = sections[0][name].copy()
        hires = {"images": {"hires": sections[1][name]}, "scalefactors": {"tissue_hires_scalef": 1.0}}
        part.uns["spatial"] = {"as the scanner called it": hires}
        part.write_h5ad(f"{name}.h5ad")
    Path("sheet.csv").write_text("section,role,image,table\na,measured,,a.h5ad\nb,measured,,\nc,stained,c.png,\n")
    assert set(told(capsys)["made"]) == set("abc")
    whole, _ = by_hand(sections)
    part = whole[whole.obs["section"] == "a"].copy()
    expected = sthisto.tl.upsample(part, 1, image={"a": sections[1]["a"]})
    assert_array_equal(ad.read_h5ad("out/a.h5ad").X, expected.X)


def test_raw_counts_are_normalised_and_genes_chosen_over_all_sections(folder, sections):
    for name in "ab":
        part = sections[0][name].copy()
        part.X = part.layers.pop("counts")
        part.write_h5ad(f"{name}.h5ad")
    assert run() == 0
    fitted = ad.read_h5ad("out/fitted.h5ad")
    counts = fitted.layers["counts"].toarray()
    assert_array_equal(fitted.X.toarray(), sthisto.metrics.lognorm(fitted.layers["counts"]).toarray())
    seen = (counts > 0).mean(axis=0) >= 0.1
    assert_array_equal(fitted.var["highly_variable"], seen)


# --- run again -------------------------------------------------------------------------------------------------------


def dates():
    return {path.name: path.stat().st_mtime_ns for path in Path("out").iterdir()}


def test_what_is_there_is_left_alone(folder, capsys):
    assert run() == 0
    before = dates()
    again = told(capsys)
    assert again["made"] == {}
    assert again["kept"] == ["a", "b", "c"]
    assert dates() == before


def test_a_run_that_was_killed_goes_on_to_the_same_bits(folder, monkeypatch, capsys):
    assert run() == 0
    whole = {name: ad.read_h5ad(f"out/{name}.h5ad") for name in "abc"}
    shutil.rmtree("out")
    calls = []

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return upsample(*arguments, **options)

    upsample = sthisto.tl.upsample
    monkeypatch.setattr(sthisto.tl, "upsample", killed)
    assert run() == 130
    assert sorted(dates()) == ["a.h5ad", "fitted.h5ad"]
    monkeypatch.setattr(sthisto.tl, "upsample", upsample)
    monkeypatch.setattr(sthisto.tl, "fit", None)  # nothing is fitted again
    summary = told(capsys)
    assert summary["kept"] == ["a"]
    assert summary["reused"] == [f"the fitted model in {Path('out/fitted.h5ad')}"]
    for name, expected in whole.items():
        made = ad.read_h5ad(f"out/{name}.h5ad")
        assert_array_equal(made.X, expected.X)
        assert_array_equal(made.obsm["spatial"], expected.obsm["spatial"])


@pytest.mark.parametrize(
    ("argv", "refit", "said"),
    [
        (["--grid", "3"], False, "--grid"),
        (["--params", "n_components=3"], True, "--params"),
        (["--seed", "1"], True, "--seed"),
    ],
)
def test_other_settings_make_it_again_and_say_which(folder, argv, refit, said, capsys):
    assert run() == 0
    before = dates()
    capsys.readouterr()
    assert main(["batch", "sheet.csv", "-o", "out", *OPTIONS, *argv]) == 0
    assert f"section a is made again, as {said} changed" in capsys.readouterr().err
    after = dates()
    assert (after["fitted.h5ad"] != before["fitted.h5ad"]) == refit
    assert all(after[f"{name}.h5ad"] != before[f"{name}.h5ad"] for name in "abc")


def test_a_picture_that_changed_is_described_again(folder, sections, capsys):
    assert run() == 0
    before = dates()
    Image.fromarray(sections[1]["c"][::-1].copy()).save("c.png")
    summary = told(capsys)
    assert summary["kept"] == ["a", "b"]
    assert set(summary["made"]) == {"c"}
    assert dates()["fitted.h5ad"] == before["fitted.h5ad"]


def test_a_further_section_that_was_stained_costs_nothing_of_the_others(folder, capsys):
    assert run() == 0
    shutil.copy("c.png", "d.png")
    with Path("sheet.csv").open("a") as file:
        file.write("d,d.png,stained\n")
    summary = told(capsys)
    assert summary["kept"] == ["a", "b", "c"]
    assert_array_equal(ad.read_h5ad("out/d.h5ad").X, ad.read_h5ad("out/c.h5ad").X)


# --- what fails ------------------------------------------------------------------------------------------------------


def test_a_section_that_fails_is_told_and_the_others_go_on(folder, sections, capsys):
    Path("b.png").write_bytes(b"no picture")
    Path("c.png").write_bytes(b"no picture either")
    summary = told(capsys, code=1)
    assert set(summary["made"]) == {"a"}
    assert set(summary["failed"]) == {"b", "c"}
    assert "b.png" in summary["failed"]["b"]
    fitted = ad.read_h5ad("out/fitted.h5ad")
    assert set(fitted.obs["section"]) == {"a"}
    before = dates()
    assert told(capsys, code=1)["kept"] == ["a"]  # tried again, and nothing is made anew for it
    assert dates() == before
    Image.fromarray(sections[1]["b"]).save("b.png")
    mended = told(capsys, code=1)
    assert set(mended["made"]) == {"a", "b"}  # learnt from both now
    assert set(mended["failed"]) == {"c"}
    assert run() == 1
    out, error = capsys.readouterr()
    assert f"{Path('out/a.h5ad')}: as it was" in out
    assert "c: failed: " in out
    assert "section c failed: " in error


def test_a_picture_without_scale_and_spots_is_told(folder, capsys):
    assert main(["batch", "sheet.csv", "-o", "out", "--model", "ridge", "--grid", "1", "--quiet"]) == 1
    out, _ = capsys.readouterr()
    assert "c: failed: the scale of c.png is unknown" in out
    assert "pass --mpp (micrometers per pixel)" in out


MISTAKES = {
    "no_sheet": (None, "no sample sheet sheet.csv"),
    "empty": ("", "has no column section, image, role (found: nothing)"),
    "column": ("section,image\na,a.png\n", "has no column role"),
    "unknown_column": ("section,image,role,stain\na,a.png,measured,HE\n", "unknown column stain"),
    "short_line": ("section,image,role\na,a.png\n", "line 2: it has another number of values"),
    "long_line": ("section,image,role\na,a.png,measured,x\n", "line 2: it has another number of values"),
    "role": (SHEET.replace("stained", "painted"), "line 4: role 'painted'"),
    "name": (SHEET.replace("b,b", ",b"), "line 3: '' cannot be a section's name"),
    "path_name": (SHEET.replace("b,b", "x/b,b"), "line 3: 'x/b' cannot be"),
    "our_name": (SHEET.replace("b,b", "fitted,b"), "'fitted' cannot be"),
    "twice": (SHEET.replace("c,c", "b,c"), "names b more than once"),
    "nothing_measured": ("section,image,role\nc,c.png,stained\n", "nothing to learn from"),
    "no_picture": (SHEET.replace("c.png", ""), "'c' was stained, but no image is named"),
    "lost": (SHEET.replace("c.png", "lost.png"), "files that are not there: lost.png"),
    "lost_table": (SHEET.replace("b,b", "z,b"), "files that are not there: z.h5ad"),
    "scale": (SHEET.replace("role", "role,mpp").replace("ed\n", "ed,0\n"), "line 2: mpp '0' is no length"),
    "binary": (b"\x89PNG\xff\xfe\x00", "no table of text"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_sheet_is_one_line_before_any_work(folder, name, capsys):
    text, expected = MISTAKES[name]
    Path("sheet.csv").unlink()
    if text is not None:
        Path("sheet.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert run() == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert error.startswith("sthisto: error: ")
    assert expected in error
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["a.h5ad", "fitted.h5ad"])
@pytest.mark.parametrize("kind", ["table", "text"])
def test_files_of_another_origin_are_not_written_over(folder, name, kind, capsys):
    Path("out").mkdir()
    if kind == "table":
        shutil.copy("b.h5ad", Path("out") / name)
    else:
        (Path("out") / name).write_text("mine")
    before = (Path("out") / name).read_bytes()
    assert run() == 2
    assert "was not made by sthisto batch" in capsys.readouterr().err
    assert (Path("out") / name).read_bytes() == before
    assert sorted(dates()) == [name]


def test_sections_that_do_not_go_together_are_refused(folder, sections, capsys):
    part = sections[0]["b"].copy()
    part.X = part.layers["counts"]
    part.write_h5ad("b.h5ad")
    assert run() == 2
    assert "X holds raw counts in section b and none in the others" in capsys.readouterr().err
    part = sections[0]["b"].copy()
    part.var_names = [f"ENSG{i}" for i in range(part.n_vars)]
    part.write_h5ad("b.h5ad")
    assert run() == 2
    assert "sections a, b have no gene in common" in capsys.readouterr().err


def test_without_any_section_to_learn_from(folder, capsys):
    for name in "ab":
        Path(f"{name}.png").write_bytes(b"no picture")
    assert run() == 2
    assert "no measured section can be fitted" in capsys.readouterr().err.splitlines()[-1]


def test_options_are_refused_before_the_work(folder, capsys):
    assert run("--params", "nope") == 2
    assert run("--genes", "lost.txt") == 2
    assert run("--interval", "90") == 2
    assert "90" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("out").exists()
    Path("out").write_text("a file")
    assert run() == 2
    assert "out is a file" in capsys.readouterr().err


# --- parts -----------------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8).filter(lambda name: name != "fitted")


@given(st.dictionaries(WORDS, st.sampled_from(["measured", "stained"]), min_size=1, max_size=5), st.booleans())
def test_a_sheet_is_read_as_it_was_written(tmp_path_factory, roles, spaced):
    folder = tmp_path_factory.mktemp("sheet")
    roles |= {"first": "measured"}
    comma = ", " if spaced else ","
    lines = [comma.join([name, "p.png", role, "t.h5ad"]) for name, role in roles.items()]
    (folder / "sheet.csv").write_text("\n".join(["section,image,role,table", *lines]), encoding="utf-8-sig")
    for name in ("p.png", "t.h5ad"):
        (folder / name).touch()
    expected = [Row(name, role, folder / "p.png", folder / "t.h5ad") for name, role in roles.items()]
    assert read_sheet(folder / "sheet.csv") == expected


def test_changes_are_named_as_they_are_typed():
    before = {"version": "1", "patch_um": None, "sections": {"a": [1], "b": [2]}, "files": [3]}
    assert changes(before, before) == []
    now = {"version": "2", "patch_um": 50, "sections": {"a": [1], "b": [4], "c": [5]}, "files": [6]}
    assert changes(before, now) == ["the version of sthisto", "--patch-um", "its files", "section b", "section c"]
    assert changes(before, {**before, "sections": {"a": [1]}}) == ["section b"]


def test_long_lists_are_cut():
    assert _batch.listed(list("abcdefg")) == "a, b, c, d, e and 2 more"
    assert _batch.listed(list("ab")) == "a, b"

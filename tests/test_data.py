"""Reading tables of every kind, telling sections apart, and state that keeps every bit or is refused."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.testing import assert_array_equal
from scipy import sparse

from sthisto import _data, grids
from sthisto._data._store import not_logarithmic

REAL = ["dlpfc/151673.h5ad", "her2st/B4.h5ad", "her2st/C2.h5ad", "her2st/C3.h5ad", "mob/MOB1.h5ad", "mob/MOB2.h5ad"]


def spots(xy, **obs):
    return AnnData(obs=pd.DataFrame(obs, index=np.arange(len(xy)).astype(str)), obsm={"spatial": np.asarray(xy)})


def array_of(kind, n=12, pitch=50.0, degrees=0.0):
    turn = np.deg2rad(degrees)
    lattice = getattr(grids.Lattice, kind)(pitch)
    xy = lattice.points(lattice.cover([[0.0, 0.0]], n / 2 * pitch))
    return xy @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]] + n * pitch


# --- several sections as one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("shuffled", [True, False])
def test_real_sections_are_one_section(data, name, numbered, shuffled):
    table = ad.read_h5ad(data(name), backed="r")
    xy, obs = np.asarray(table.obsm["spatial"]), table.obs[["array_row", "array_col"]]
    table.file.close()
    order = np.random.default_rng(0).permutation(len(xy)) if shuffled else np.arange(len(xy))
    section = spots(xy[order], **({key: obs[key].to_numpy()[order] for key in obs} if numbered else {}))
    [each] = _data.read_sections(section, None).values()
    assert len(each.rows) == len(xy)


def test_a_folder_of_space_ranger_is_one_section(data):
    table = pd.read_csv(data("visium_v2_cytassist") / "spatial" / "tissue_positions.csv")
    xy = table[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()
    each = _data.read_sections(spots(xy), None)["section"]
    assert (each.array, round(each.pitch, 1)) == ("hexagonal", 21.4)


@pytest.mark.parametrize(
    "names",
    [("her2st/C2.h5ad", "her2st/C3.h5ad"), ("her2st/C2.h5ad", "her2st/B4.h5ad"), ("mob/MOB1.h5ad", "mob/MOB2.h5ad")],
)
@pytest.mark.parametrize("numbered", [True, False])
def test_two_real_sections_on_one_plane_are_noticed(data, names, numbered):
    tables = [ad.read_h5ad(data(name)) for name in names]
    both = ad.concat(tables, index_unique="-", keys=["a", "b"], label="slide")
    columns = ["array_row", "array_col"] if numbered else []
    section = spots(both.obsm["spatial"], slide=both.obs["slide"].to_numpy())
    section.obs[columns] = both.obs[columns].to_numpy()
    what = "array_row, array_col" if numbered else "sites, .* px apart,"
    with pytest.raises(ValueError, match=f"% of the spots have .*{what}.* that another spot has.* Pass library_key="):
        _data.read_sections(section, None)
    found = _data.read_sections(section, "slide")
    assert [len(each.rows) for each in found.values()] == [table.n_obs for table in tables]


@settings(max_examples=4, deadline=None)
@given(
    kind=st.sampled_from(["hexagonal", "square"]),
    degrees=st.floats(0, 90),
    jitter=st.floats(0, 0.05),
    kept=st.floats(0.7, 1),
    shift=st.tuples(st.floats(0.3, 0.7), st.floats(0.3, 0.7)),
    random_state=st.integers(0, 99),
)
def test_one_array_passes_and_a_second_over_it_does_not(kind, degrees, jitter, kept, shift, random_state):
    random = np.random.default_rng(random_state)

    def section(offset):
        xy = array_of(kind, degrees=degrees)
        xy = xy[random.random(len(xy)) < kept]
        return xy + offset + random.normal(0, 50 * jitter, xy.shape)

    first, second = section(np.zeros(2)), section(50 * np.array(shift))
    assert_array_equal(_data.read_sections(spots(first), None)["section"].rows, np.arange(len(first)))
    with pytest.raises(ValueError, match="several sections seem to overlap"):
        _data.read_sections(spots(np.concatenate([first, second])), None)


def test_cells_are_no_array_and_pass():
    xy = np.random.default_rng(0).uniform(0, 1000, (1500, 2))
    each = _data.read_sections(spots(xy), None)["section"]
    assert each.array == "scattered"
    nearest = np.sort(np.linalg.norm(xy[:, None] - xy, axis=2), axis=1)[:, 1]
    assert each.pitch == pytest.approx(np.median(nearest))


def test_sections_come_in_the_order_of_their_first_spot():
    adata = spots(
        np.random.default_rng(0).uniform(size=(6, 2)), slide=pd.Categorical([2, 1, 2, 10, 1, 2], [1, 2, 3, 10])
    )
    found = _data.section_rows(adata, "slide")
    assert {name: rows.tolist() for name, rows in found.items()} == {"2": [0, 2, 5], "1": [1, 4], "10": [3]}
    assert list(found) == ["2", "1", "10"]
    assert list(_data.section_rows(adata, None)) == ["section"]
    adata.uns["spatial"] = {"V1": {}}
    assert list(_data.section_rows(adata, None)) == ["V1"]


# --- matrices --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    values=arrays(np.float32, (7, 5), elements=st.floats(0, 8, width=32)),
    rows=st.sets(st.integers(0, 6), min_size=1).map(sorted),
    columns=st.permutations(range(5)).map(lambda order: order[:3]),
    make=st.sampled_from([np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, sparse.csc_array]),
)
def test_any_rows_and_genes_of_any_matrix(values, rows, columns, make):
    values[0, 0] += 0.5  # not whole numbers alone
    adata = AnnData(make(values))
    genes = adata.var_names[columns].to_numpy().astype(str)
    wanted = values[np.ix_(rows, columns)]
    if wanted.max() > 1 and (wanted == np.rint(wanted)).all():
        with pytest.raises(ValueError, match="raw counts"):
            _data.expression(adata, np.array(rows), genes, None)
    else:
        assert_array_equal(_data.expression(adata, np.array(rows), genes, None), wanted, strict=True)


def test_an_object_without_x():
    with pytest.raises(ValueError, match=r"adata.X is empty. Pass layer="):
        _data.expression(AnnData(var=pd.DataFrame(index=["a"])), np.arange(0), np.array(["a"]), None)


def test_sparse_and_tabular_features():
    adata = spots(np.zeros((4, 2)))
    values = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    adata.obsm["X_csr"] = sparse.csr_matrix(values)
    adata.obsm["X_table"] = pd.DataFrame(values, index=adata.obs_names, columns=list("abc"))
    for key in ("X_csr", "X_table"):
        assert_array_equal(_data.features(adata, key, np.array([3, 1])), values[[3, 1]], strict=True)


def test_repeated_gene_names():
    adata = AnnData(np.zeros((2, 3)))
    adata.var_names = ["a", "b", "c"]
    adata.var.index = ["a", "a", "c"]
    with pytest.raises(ValueError, match="var_names_make_unique"):
        _data.genes_to_model(adata, ["c"])


# --- state -----------------------------------------------------------------------------------------------------------


def a_fit(**changes):
    random = np.random.default_rng(0)
    fields = {
        "model": "ridge",
        "params": {"epochs": 3, "rate": 0.1, "sizes": [1, 2.5, None], "kind": "a/b", "none": None},
        "genes": np.array(["PCP4", "β-actin"]),
        "sections": np.array(["a/b", "ü"]),
        "library_key": "slide",
        "features_key": "X_histo",
        "feature_settings": '{"encoder": "handcrafted"}',
        "layer": "",
        "random_state": 7,
        "pitch": np.array([0.1, 1 / 3]),
        "spots": np.array(["AAAC-1", "1", "x"]),
        "xy": random.normal(size=(3, 2)),
        "image_paths": np.array(["slide.tif", ""]),
        "image_mpp": np.array([0.5, 0.7]),
        "arrays": {
            "w": random.normal(size=(3, 2)).astype(np.float32),
            "scalar": np.array(2.5),
            "none": np.zeros((0, 4)),
        },
        "history": {"loss": np.array([0.1, np.nan, 1e-300]), "empty": np.array([])},
    }
    return _data.Fit(**{**fields, **changes})


def assert_fits_equal(found, expected):
    for name, value in vars(expected).items():
        other = getattr(found, name)
        if name in ("arrays", "history"):
            assert set(other) == set(value)
            for key in value:
                assert_array_equal(other[key], value[key], strict=True)
        elif isinstance(value, np.ndarray):
            assert_array_equal(other, value)
        else:
            assert other == value, name


kinds = st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_])
any_array = kinds.flatmap(lambda kind: arrays(kind, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)))


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text("abc.é_", min_size=1), any_array, max_size=4))
def test_state_comes_back_to_the_bit(tmp_path_factory, state):
    fit, path = a_fit(arrays=state), tmp_path_factory.mktemp("fit") / "fit"
    assert_fits_equal(_data.unpack(_data.pack(fit)), fit)
    _data.save_fit(fit, path)
    assert_fits_equal(_data.load_fit(path), fit)
    assert [each.name for each in path.parent.iterdir()] == ["fit"]


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")
@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_state_comes_back_from_files(tmp_path, form):
    adata = AnnData(np.zeros((1, 1)))
    _data.write_fit(adata, "mine", a_fit())
    with ad.settings.override(zarr_write_format=2):
        getattr(adata, f"write_{form}")(tmp_path / form)
    assert_fits_equal(_data.read_fit(getattr(ad, f"read_{form}")(tmp_path / form), "mine"), a_fit())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 7))
def test_any_flipped_bit_is_noticed(at, bit):
    record = _data.pack(a_fit())
    state = record["state"].copy()
    state[at % len(state)] ^= 1 << bit
    with pytest.raises(ValueError, match=r"damaged: it does not match its checksum. Fit again"):
        _data.unpack({**record, "state": state})


@pytest.mark.parametrize("key", sorted(_data.pack(a_fit())))
def test_missing_parts_are_noticed(key):
    record = _data.pack(a_fit())
    del record[key]
    with pytest.raises(ValueError, match=r"the fitted model is damaged: .* Fit again"):
        _data.unpack(record)


@pytest.mark.parametrize(
    "changes",
    [
        {"genes": np.array(["PCP4", "MBP"])},
        {"xy": np.ones((3, 2))},
        {"params": "{"},
        {"params": "{}"},
        {"random_state": "seven"},
        {"random_state": 8},
        {"history": None},
        {"pitch": np.array([1.0, np.inf])},
    ],
)
def test_changed_parts_are_noticed(changes):
    with pytest.raises(ValueError, match="the fitted model is damaged"):
        _data.unpack({**_data.pack(a_fit()), **changes})


def test_a_newer_schema_is_named_before_anything_else():
    with pytest.raises(ValueError, match=f"has schema 99, this sthisto reads up to {1}: upgrade sthisto"):
        _data.unpack({"schema": 99, "all": "new"})


def test_writing_keeps_what_was_there(section):
    _data.write_fit(section, "one", a_fit())
    _data.write_fit(section, "two", a_fit())
    assert set(section.uns["sthisto"]) == {"features", "fit"}
    assert set(section.uns["sthisto"]["fit"]) == {"one", "two"}


def test_predictions_with_values_close_to_zero_are_no_multiples_of_the_smallest():
    values = np.random.default_rng(0).uniform(0, 5, (500, 20)).astype(np.float32)
    values[0, 0] = 1e-5
    assert not not_logarithmic(values)
    assert "multiples of 0.25" in not_logarithmic(np.random.default_rng(0).poisson(5, (500, 20)).astype(np.float32) / 4)

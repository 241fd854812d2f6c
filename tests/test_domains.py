"""Spatial domains: graphs against scipy and brute force, labels, and the verb with its laws and refusals."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse
from scipy.spatial.distance import cdist
from sklearn.metrics import adjusted_rand_score

import sthisto
from sthisto import domains
from sthisto.domains import METHODS, agreement, carry
from sthisto.domains._clusters import leiden
from sthisto.domains._graph import Graph, nearest_pairs, pairs_within

FAST = {
    "stagate": {"epochs": 15, "hidden": 16, "dim": 4},
    "stmask": {"epochs": 15, "hidden": 16, "latent": 8, "dim": 4, "neighbors": 6},
    "kmeans": {},
    "leiden": {"components": 5},
}


def find(adata, method="stagate", n_domains=3, **options):
    options = {"params": FAST.get(method), "device": "cpu"} | options
    sthisto.tl.spatial_domains(adata, method, n_domains, **options)
    return adata.obs[options.get("key_added", "spatial_domain")]


# --- graphs --------------------------------------------------------------------------------------------------------


def random_graph(n: int, random_state: int, *, loops: bool = True):
    rng = np.random.default_rng(random_state)
    pairs = np.argwhere(np.triu(rng.random((n, n)) < 0.3, 1))
    return pairs, Graph.of(pairs, n, loops=loops), rng


def matrix(graph: Graph, weights):
    return sparse.coo_matrix(
        (np.asarray(weights), (graph.rows.numpy(), graph.columns.numpy())), shape=(len(graph),) * 2
    ).toarray()


@given(n=st.integers(1, 12), random_state=st.integers(0, 99), loops=st.booleans())
@settings(deadline=None, max_examples=25)
def test_edges(n, random_state, loops):
    pairs, graph, _ = random_graph(n, random_state, loops=loops)
    expected = np.eye(n) if loops else np.zeros((n, n))
    expected[pairs[:, 0], pairs[:, 1]] = expected[pairs[:, 1], pairs[:, 0]] = 1
    assert_array_equal(matrix(graph, np.ones(len(graph.rows))), expected)
    assert_array_equal(graph.rows[graph.mirror], graph.columns)
    assert_array_equal(graph.starts.diff(), expected.sum(axis=1))
    ends = np.sort(torch.stack([graph.rows, graph.columns], dim=1), axis=1)
    loop = ends[:, 0] == ends[:, 1]
    assert_array_equal(np.concatenate([pairs, [[0, 0]]])[graph.pair.numpy()][~loop], ends[~loop])
    assert (graph.pair[torch.from_numpy(loop)] == len(pairs)).all()


@given(n=st.integers(1, 12), random_state=st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_what_travels_along_edges(n, random_state):
    """Sums, products, softmax and their gradients, against full matrices."""
    _, graph, rng = random_graph(n, random_state)
    weights = torch.from_numpy(rng.normal(size=len(graph.rows))).requires_grad_()
    x = torch.from_numpy(rng.normal(size=(n, 3))).requires_grad_()
    whole = torch.zeros(n, n, dtype=torch.float64).index_put((graph.rows, graph.columns), weights)
    for found, expected in (
        (graph.propagate(weights, x), whole @ x),
        (graph.sum(weights), whole.sum(dim=1)),
        (graph.products(x), (x @ x.T)[graph.rows, graph.columns]),
        (
            graph.softmax(weights),
            (whole + torch.where(whole == 0, -torch.inf, 0)).softmax(1)[graph.rows, graph.columns],
        ),
    ):
        assert_allclose(found.detach(), expected.detach(), atol=1e-12)
        pull = torch.from_numpy(rng.normal(size=found.shape))
        mine, theirs = (torch.autograd.grad((each * pull).sum(), [weights, x], allow_unused=True, retain_graph=True)
                        for each in (found, expected))  # fmt: skip
        for one, other in zip(mine, theirs, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_allclose(one, other, atol=1e-10)


def test_graph_convolution_weights():
    _, graph, _ = random_graph(9, 0)
    keep = torch.from_numpy(np.append(np.arange(graph.pair.max().item()) % 2 == 0, True))[graph.pair]
    links = matrix(graph, keep.numpy().astype(float))
    degree = links.sum(axis=1)
    assert_allclose(matrix(graph, graph.normalised(keep)), links / np.sqrt(degree[:, None] * degree), atol=1e-6)


points = st.integers(2, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=n, max_size=n, unique=True),
        st.lists(st.integers(0, 1), min_size=n, max_size=n),
    )
)


@given(points, st.floats(0.5, 6))
@settings(deadline=None, max_examples=40)
def test_neighbors_within_a_radius(drawn, radius):
    xy, section = (np.array(each, dtype=kind) for each, kind in zip(drawn, (float, int), strict=True))
    near = (cdist(xy, xy) <= radius) & (section[:, None] == section)
    assert_array_equal(pairs_within(xy, section, radius), np.argwhere(np.triu(near, 1)))


@given(points, st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_nearest_neighbors(drawn, k):
    """Each has its k nearest of its own section, as distances tell: which of several equal ones may differ."""
    xy, section = (np.array(each, dtype=kind) for each, kind in zip(drawn, (float, int), strict=True))
    pairs = nearest_pairs(xy, section, k)
    assert (section[pairs[:, 0]] == section[pairs[:, 1]]).all()
    assert (pairs[:, 0] < pairs[:, 1]).all()
    links = Graph.of(pairs, len(xy), loops=False)
    for spot in range(len(xy)):
        mine = np.sort(cdist(xy[[spot]], xy[section == section[spot]])[0])[1 : k + 1]
        found = np.sort(cdist(xy[[spot]], xy[links.columns[links.rows == spot].numpy()])[0])
        assert_allclose(found[: len(mine)], mine)


def test_a_graph_is_as_large_as_its_edges():
    xy = np.stack(np.meshgrid(np.arange(200.0), np.arange(200.0)), axis=-1).reshape(-1, 2)
    section = np.zeros(len(xy), dtype=int)
    assert len(pairs_within(xy, section, 1.5)) == 2 * 200 * 199 + 2 * 199 * 199
    assert len(nearest_pairs(xy, section, 12)) < 12 * len(xy)


# --- labels --------------------------------------------------------------------------------------------------------


def test_carrying_labels_is_a_vote():
    spots = [[0.0, 0], [10, 0], [100, 0]]
    around = [[0.1, 0], [1, 0], [-1, 0], [9, 0], [11, 0], [13, 0]]
    assert carry(list("baaabb"), around, spots).tolist() == ["a", "b", "b"]  # a vote, a vote, the nearest
    assert carry(list("ab"), [[1, 0], [0.5, 0]], [[0.0, 0]]).tolist() == ["b"]  # a tie goes to the nearer


def test_carrying_labels_of_the_spots_themselves():
    xy = np.random.default_rng(0).random((50, 2))
    labels = pd.Categorical(np.arange(50) % 4)
    assert_array_equal(carry(labels, xy, xy), labels)


def test_agreement_leaves_out_spots_without_a_label():
    rng = np.random.default_rng(0)
    found, truth = rng.integers(0, 3, 60), rng.integers(0, 3, 60).astype(object)
    truth[::7] = np.nan
    known = np.arange(60) % 7 > 0
    assert agreement(found, truth) == pytest.approx(adjusted_rand_score(truth[known].astype(int), found[known]))
    assert agreement(pd.Categorical(["x", "x", "y"]), pd.Series(["1", "1", "2"])) == 1


def test_labels_that_are_missing_are_refused():
    with pytest.raises(ValueError, match="1 of 2 labels of points are NaN"):
        carry(["a", np.nan], [[0, 0], [1, 0]], [[0, 0]])
    with pytest.raises(ValueError, match="3 labels of points, but there are 2"):
        carry(["a", "b", "c"], [[0, 0], [1, 0]], [[0, 0]])
    with pytest.raises(ValueError, match="1 of 2 domains are NaN"):
        agreement(["a", None], ["x", "y"])
    with pytest.raises(ValueError, match="none of the 2 spots has a reference label"):
        agreement(["a", "b"], [None, np.nan])


def test_domains_are_named_by_size():
    embedding = np.concatenate([np.full((4, 2), 9.0), np.zeros((30, 2)), np.full((9, 2), -9.0)]).astype(np.float32)
    embedding += np.random.default_rng(0).normal(size=embedding.shape) / 10
    for how in ("mixture", "kmeans"):
        found = domains.cluster(embedding, how, 3, random_state=0)
        assert found.tolist() == ["2"] * 4 + ["0"] * 30 + ["1"] * 9
        assert found.categories.tolist() == ["0", "1", "2"]


def test_leiden_finds_a_number_of_communities():
    rng = np.random.default_rng(0)
    embedding = (rng.normal(size=(160, 4)) + 20 * np.eye(4)[np.arange(160) // 40]).astype(np.float32)
    assert agreement(leiden(embedding, 4, resolution=1.0, random_state=0), np.arange(160) // 40) == 1
    with pytest.raises(ValueError, match=r"no resolution up to .* gave 3 communities \(found: .*4"):
        leiden(embedding, 3, resolution=1.0, random_state=0)
    with pytest.raises(ValueError, match="15 spots are too few for leiden"):
        leiden(embedding[:15], None, resolution=1.0, random_state=0)


# --- the verb ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written(section, method):
    before = set(section.obsm), set(section.uns)
    labels = find(section, method, 3, random_state=4)
    assert labels.cat.categories.tolist() == ["0", "1", "2"]
    assert labels.value_counts().is_monotonic_decreasing
    spec = METHODS[method]
    assert set(section.obsm) - before[0] == {spec.embedding} - {""}
    assert set(section.uns) - before[1] <= {"sthisto", spec.network} - {""}
    if spec.embedding:
        embedding = section.obsm[spec.embedding]
        assert embedding.shape == (100, 4)
        assert embedding.dtype == np.float32
        assert np.isfinite(embedding).all()
    record = section.uns["sthisto"]["domains"]["spatial_domain"]
    assert record["method"] == method
    assert json.loads(record["params"]) == FAST[method]
    assert (record["n_domains"], record["n_genes"], record["random_state"], record["layer"]) == (3, 20, 4, "")
    assert all(isinstance(value, str | int | float) for value in record.values())
    assert ("last_train_loss" in record) == spec.iterative
    assert spec.reference


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_table_does_not_matter(section, method):
    """Not even the names of the domains, nor a bit of the embedding."""
    shuffled = section[np.random.default_rng(0).permutation(section.n_obs)].copy()
    labels, again = find(section, method), find(shuffled, method)
    pd.testing.assert_series_equal(again.loc[section.obs_names], labels)
    if key := METHODS[method].embedding:
        assert_array_equal(shuffled[section.obs_names].obsm[key], section.obsm[key])


@pytest.mark.parametrize("method", METHODS)
def test_survives_a_file_and_repeats(section, method, tmp_path):
    find(section, method)
    section.write_h5ad(tmp_path / "a.h5ad")
    read = ad.read_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_series_equal(read.obs["spatial_domain"], section.obs["spatial_domain"])
    assert dict(read.uns["sthisto"]["domains"]["spatial_domain"]) == section.uns["sthisto"]["domains"]["spatial_domain"]
    assert find(read, method, key_added="again").tolist() == section.obs["spatial_domain"].tolist()
    if key := METHODS[method].embedding:
        assert_array_equal(read.obsm[key], section.obsm[key])
        assert set(read.uns["sthisto"]["domains"]) == {"spatial_domain", "again"}


@pytest.mark.parametrize("method", ["stagate", "stmask"])
def test_sections_are_no_neighbors(sections, method):
    """What one section holds reaches the other through what is learnt alone: without learning, not at all."""
    params = FAST[method] | {"epochs": 1, "learning_rate": 0.0}
    params |= {"weight_decay": 0.0} if method == "stagate" else {"components": 12}
    first = (sections.obs["library"] == "synthetic_0").to_numpy()
    sections.obsm["own"] = sections.X.toarray()
    changed = sections.copy()
    changed.obsm["own"][~first] += 5
    built = [domains.build(method, params) for _ in range(2)]
    xy, section = sections.obsm["spatial"] / 100.0, (~first).astype(int)
    for each in built:
        pairs = each.links(xy, section)
        assert (section[pairs[:, 0]] == section[pairs[:, 1]]).all()
        assert len(pairs) > 100
    if method == "stagate":
        one, other = (
            each.embed(adata.obsm["own"].astype(np.float32), xy, section, random_state=0, progress=False)
            for each, adata in zip(built, (sections, changed), strict=True)
        )
        assert_allclose(one[first], other[first], atol=1e-4)
        assert np.abs(one[~first] - other[~first]).max() > 0.1


def test_several_sections(sections):
    with pytest.raises(ValueError, match="Pass library_key="):
        find(sections)
    labels = find(sections, library_key="library")
    assert len(labels) == sections.n_obs
    network = sections.uns["Spatial_Net"]
    library = sections.obs["library"]
    assert (library[network["Cell1"]].to_numpy() == library[network["Cell2"]].to_numpy()).all()


def test_denoised_genes_alone_are_read(section):
    sthisto.tl.fit(section, "ridge", genes=section.var_names[:12])
    sthisto.tl.predict(section)
    labels = find(section, "kmeans", layer="sthisto")
    record = section.uns["sthisto"]["domains"]["spatial_domain"]
    assert (record["n_genes"], record["layer"]) == (12, "sthisto")
    section.X = section.layers["sthisto"]  # what people do
    assert find(section, "kmeans").tolist() == labels.tolist()


@pytest.fixture(scope="module")
def dense(request):
    adata = request.getfixturevalue("_section").copy()
    adata.var["highly_variable"] = np.arange(adata.n_vars) % 2 == 0
    sthisto.tl.fit(adata, "ridge", genes=adata.var_names)
    return sthisto.tl.upsample(adata, 2, encoder=request.getfixturevalue("encoder"))


@pytest.mark.parametrize("method", METHODS)
def test_dense_maps_have_domains(dense, method):
    dense = dense.copy()
    labels = find(dense, method)
    assert labels.nunique() == 3
    assert dense.uns["sthisto"]["domains"]["spatial_domain"]["n_genes"] == 10  # the highly variable ones


def test_the_authors_package_finds_what_it_reads(dense, tmp_path):
    """What Cal_Spatial_Net and train_STAGATE take from an AnnData, done as they do it, on what was read from a file."""
    find(dense := dense.copy())
    dense.write_h5ad(tmp_path / "dense.h5ad")
    adata = ad.read_h5ad(tmp_path / "dense.h5ad")
    places = pd.DataFrame(adata.obsm["spatial"])
    places.index = adata.obs.index
    places.columns = ["imagerow", "imagecol"]  # so there have to be two
    assert places.dtypes.map(pd.api.types.is_float_dtype).all()
    chosen = adata[:, adata.var["highly_variable"]]
    values = chosen.X.toarray() if sparse.issparse(chosen.X) else np.asarray(chosen.X)
    assert torch.isfinite(torch.FloatTensor(values)).all()
    table = adata.uns["Spatial_Net"].copy()
    assert isinstance(table, pd.DataFrame)
    assert table.columns.tolist() == ["Cell1", "Cell2", "Distance"]
    number = dict(zip(adata.obs.index, range(adata.n_obs), strict=True))
    ends = np.stack([table[name].map(number).to_numpy() for name in ("Cell1", "Cell2")])
    links = sparse.coo_matrix((np.ones(len(table)), ends), shape=(adata.n_obs,) * 2).tocsr()
    assert (links != links.T).nnz == 0
    assert links.diagonal().sum() == 0
    assert links.max() == 1
    xy = adata.obsm["spatial"]
    assert_allclose(table["Distance"], np.linalg.norm(xy[ends[0]] - xy[ends[1]], axis=1))
    radius = 1.5 * sthisto.grids.Lattice.fit(xy).pitch
    assert links.nnz == (cdist(xy, xy) <= radius).sum() - adata.n_obs


def test_without_a_number_communities_decide(section):
    labels = find(section, "stagate", None, resolution=0.5)
    fewer = find(section, "stagate", None, resolution=0.01)
    assert 1 <= fewer.nunique() <= labels.nunique()
    record = section.uns["sthisto"]["domains"]["spatial_domain"]
    assert (record["clusters"], record["resolution"]) == ("leiden", 0.01)


def test_a_representation_of_ones_own(section):
    halves = (section.obsm["spatial"][:, 0] > np.median(section.obsm["spatial"][:, 0])).astype(float)
    section.obsm["halves"] = np.stack([halves, 1 - halves], axis=1)
    assert agreement(find(section, "kmeans", 2, use_rep="halves"), halves) == 1
    assert find(section, "stagate", 2, use_rep="halves").nunique() == 2
    assert section.uns["sthisto"]["domains"]["spatial_domain"]["use_rep"] == "halves"


def test_views_and_colors(section):
    section.uns["spatial_domain_colors"] = ["red"]
    view = section[:60]
    assert find(view).nunique() == 3
    assert "spatial_domain" not in section.obs
    assert "spatial_domain_colors" not in view.uns


def nowhere(adata):
    del adata.obsm["spatial"]


def unknown(adata):
    adata.X = adata.X.toarray()
    adata.X[3, 2] = np.nan


def empty(adata):
    adata.layers["nothing"] = np.full(adata.shape, np.nan)


def unnamed(adata):
    adata.obs["slide"] = pd.Series(["a"] * 99 + [None], index=adata.obs_names, dtype=object)


@pytest.mark.parametrize(
    ("options", "change", "error", "match"),
    [
        ({"method": "banksy"}, None, KeyError, r"no method 'banksy'.*kmeans, leiden, stagate, stmask"),
        ({"n_domains": 101}, None, ValueError, "101 domains were asked for, but there are 100 spots"),
        ({"n_domains": 0}, None, ValueError, "n_domains=0: expected a whole number of 1 or more"),
        ({"n_domains": 2.5}, None, ValueError, r"n_domains=2\.5"),
        ({"n_domains": True}, None, ValueError, "n_domains=True"),
        ({"method": "kmeans", "n_domains": None}, None, ValueError, "needs the number of domains"),
        ({}, nowhere, KeyError, r"obsm\['spatial'\] is missing"),
        ({"layer": "denoised"}, None, KeyError, r"no layer 'denoised'.*counts"),
        ({"layer": "counts"}, None, ValueError, "seems to hold raw counts"),
        ({}, unknown, ValueError, "1 NaN or infinite values in 1"),
        ({"layer": "nothing"}, empty, ValueError, "NaN throughout for all 20 genes"),
        ({"library_key": "slide"}, unnamed, ValueError, "1 rows .* name no section"),
        ({"library_key": "batch"}, None, KeyError, "no column 'batch'"),
        ({"genes": ["PCP4"]}, None, KeyError, "PCP4"),
        ({"use_rep": "X_pca"}, None, KeyError, "X_pca"),
        ({"use_rep": "X_histo", "layer": "counts"}, None, ValueError, "leave out layer= and genes="),
        ({"params": {"depth": 3}}, None, ValueError, r"'stagate' has no setting 'depth' \(there are: epochs"),
        ({"params": {"epochs": 0}}, None, ValueError, "epochs is 0"),
        ({"params": {"epochs": {1}}}, None, TypeError, "settings are numbers"),
        ({"device": "cuda:99"}, None, ValueError, "cuda:99"),
        ({"key_added": "a/b"}, None, ValueError, "key_added='a/b'"),
    ],
)
def test_bad_input(section, refuses, options, change, error, match):
    if change:
        change(section)
    with refuses(section, error, match):
        find(section, **options)

"""Sections to test on, made once, and the promise that an error leaves the user's object as it was."""

import os
import warnings

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TQDM_DISABLE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would only wait for each other
    for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(threads, "1")

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import sthisto

DATA = Path(__file__).parents[2] / "shared" / "data"


class Colors:
    """The cheapest encoder that keeps the contract: exact sums of the pixels, so no bit depends on the batch."""

    name, dim, input_size, patch_um = "colors", 6, 8, 100.0

    def __call__(self, patches):
        whole = patches.astype(np.int64)
        sums = [whole.sum(axis=(1, 2)), (whole**2).sum(axis=(1, 2))]
        return (np.concatenate(sums, axis=1) / [[1e3] * 3 + [1e6] * 3]).astype(np.float32)


@pytest.fixture(scope="session")
def encoder():
    return Colors()


@pytest.fixture(scope="session")
def _section(encoder):
    adata = sthisto.datasets.synthetic(100, n_genes=20, random_state=1)
    sthisto.pp.extract_features(adata, encoder)
    return adata


@pytest.fixture(scope="session")
def _sections(encoder):
    adata = sthisto.datasets.synthetic(60, n_genes=12, n_sections=2, random_state=2)
    sthisto.pp.extract_features(adata, encoder, library_key="library")
    return adata


@pytest.fixture
def section(_section):
    """One section of 100 spots, with features."""
    return _section.copy()


@pytest.fixture
def sections(_sections):
    """Two sections of 60 spots in one object, with features; ``obs["library"]`` names them."""
    return _sections.copy()


@pytest.fixture(scope="session")
def refuses():
    """Give a context in which an error has to come, with its message, that changes nothing of the object."""

    @contextmanager
    def context(adata, error, match):
        before = contents(adata)
        with pytest.raises(error, match=match):
            yield
        assert_same(contents(adata), before)

    return context


@pytest.fixture(scope="session")
def data():
    """Give the path of a real section, or skip."""

    def path(name):
        if not (DATA / name).exists():
            pytest.skip(f"real data {name} are not here")
        return DATA / name

    return path


def contents(adata):
    """Everything in an AnnData, copied."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Observation names are not unique")
        whole = adata.to_memory(copy=True) if adata.isbacked else adata.copy()
    slots = {name: dict(getattr(whole, name)) for name in ("obsm", "varm", "obsp", "layers", "uns")}
    return {"X": whole.X, "obs": whole.obs, "var": whole.var, "view": adata.is_view, **slots}


def assert_same(found, expected, where="adata"):
    assert type(found) is type(expected), where
    if isinstance(expected, Mapping):
        assert list(found) == list(expected), where
        for name in expected:
            assert_same(found[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected)
    elif sparse.issparse(expected):
        assert (found != expected).nnz == 0, where
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected, where, strict=True)
    else:
        assert found == expected, where

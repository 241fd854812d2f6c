"""Fit models of expression, predict at the spots and on dense grids, and save fitted models."""

from sthisto.tl._domains import spatial_domains
from sthisto.tl._evaluate import evaluate
from sthisto.tl._files import load, save
from sthisto.tl._fit import fit
from sthisto.tl._gene_test import test_genes
from sthisto.tl._predict import predict
from sthisto.tl._rasterize import rasterize
from sthisto.tl._upsample import upsample

__all__ = ["evaluate", "fit", "load", "predict", "rasterize", "save", "spatial_domains", "test_genes", "upsample"]

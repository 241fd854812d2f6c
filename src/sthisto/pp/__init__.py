"""Prepare a section: what is known of it, image features around every spot, and its nuclei."""

from sthisto.pp._check import check
from sthisto.pp._features import extract_features, import_features
from sthisto.pp._nuclei import find_nuclei

__all__ = ["check", "extract_features", "find_nuclei", "import_features"]

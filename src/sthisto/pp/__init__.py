"""Prepare a section: what is known of it, and image features around every spot."""

from sthisto.pp._check import check
from sthisto.pp._features import extract_features, import_features

__all__ = ["check", "extract_features", "import_features"]

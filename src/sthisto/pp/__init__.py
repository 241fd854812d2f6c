"""Prepare a section: what is known of it, whether its image is registered, image features, and nuclei."""

from sthisto.pp._alignment import align, check_alignment
from sthisto.pp._check import check
from sthisto.pp._features import extract_features, import_features
from sthisto.pp._nuclei import find_nuclei

__all__ = ["align", "check", "check_alignment", "extract_features", "find_nuclei", "import_features"]

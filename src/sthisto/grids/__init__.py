"""Lattices, distances and splits of spots: plain arrays in, plain arrays out.

Spots of an array form a lattice, ``origin + i * a + j * b``, be it hexagonal (Visium), square (Spatial
Transcriptomics, Visium HD) or turned and slightly stretched by the scanner. :class:`Lattice` finds it from the spots
alone and makes it denser; the other functions find the spots near a point and those to hold out.
Lengths are in the units of ``xy``: pixels of the full-resolution image throughout the package.
"""

from sthisto.grids._lattice import Lattice
from sthisto.grids._spots import blocks, hold_out, nearest, spacing, within

__all__ = ["Lattice", "blocks", "hold_out", "nearest", "spacing", "within"]

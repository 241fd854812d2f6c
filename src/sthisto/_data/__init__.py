"""The only part that knows where things live in AnnData.

Readers turn a table into plain arrays and refuse what the models could not survive, saying what was looked for, what is
there and what to do. Writers put results back in one step, so an error on the way leaves the user"s object as it was.
State is data: strings, numbers, arrays and one safetensors blob, which h5ad and zarr keep to the bit.
"""

from sthisto._data._domains import measured_somewhere, network, write_domains
from sthisto._data._pictures import description, find_image, recorded_image, scale, small_picture, write_features
from sthisto._data._records import LIBRARY, SCHEMA, UNFITTED, UNS, Description, Fit, Place, Points, check_key, write
from sthisto._data._results import (
    gene_columns,
    new_slide,
    points_obs,
    spot_diameter,
    write_judgement,
    write_prediction,
)
from sthisto._data._spatialdata import accepts_spatialdata
from sthisto._data._spots import fitted_places, places, positions, sections
from sthisto._data._state import load_fit, no_spots, pack, plain_params, read_fit, save_fit, unpack, write_fit
from sthisto._data._values import expression, features, finite_features, genes_to_model, training_rows

__all__ = [
    "LIBRARY",
    "SCHEMA",
    "UNFITTED",
    "UNS",
    "Description",
    "Fit",
    "Place",
    "Points",
    "accepts_spatialdata",
    "check_key",
    "description",
    "expression",
    "features",
    "find_image",
    "finite_features",
    "fitted_places",
    "gene_columns",
    "genes_to_model",
    "load_fit",
    "measured_somewhere",
    "network",
    "new_slide",
    "no_spots",
    "pack",
    "places",
    "plain_params",
    "points_obs",
    "positions",
    "read_fit",
    "recorded_image",
    "save_fit",
    "scale",
    "sections",
    "small_picture",
    "spot_diameter",
    "training_rows",
    "unpack",
    "write",
    "write_domains",
    "write_features",
    "write_fit",
    "write_judgement",
    "write_prediction",
]

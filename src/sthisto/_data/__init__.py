"""The only part that knows where things are in AnnData and SpatialData.

Readers turn a table into plain records and arrays and refuse what the models could not survive, with what was
expected, what is there and what to do. Writers put results back in one step, so an error on the way leaves the user's object
as it was. State is data: strings, numbers, arrays and one safetensors blob, which h5ad and zarr keep to the bit.
"""

from sthisto._data._features import (
    add_metadata,
    compare_settings,
    need_metadata,
    read_metadata,
    with_features,
    write_features,
)
from sthisto._data._fit_record import Fit, load_fit, pack, plain_params, read_fit, save_fit, unpack, write_fit
from sthisto._data._images import (
    open_feature_image,
    open_fit_image,
    open_section_image,
    spot_diameter,
    stored_image,
)
from sthisto._data._report import expression_finding, record_findings, section_findings
from sthisto._data._results import (
    GridPoints,
    empty_object,
    new_object,
    points_obs,
    write_domains,
    write_gene_test,
    write_prediction,
)
from sthisto._data._scale import factor_of, factors_of, resolve_scale, scale_sources
from sthisto._data._section import (
    UNFITTED,
    FeatureMetadata,
    SectionData,
    SectionImage,
    read_fitted_sections,
    read_sections,
    read_stained_sections,
    section_rows,
    spatial_entries,
)
from sthisto._data._shapes import rasterized
from sthisto._data._spatialdata import SpatialDataView, accepts_spatialdata, is_spatialdata, to_anndata
from sthisto._data._store import (
    UNS,
    check_key,
    coordinates,
    expression,
    features,
    finite_features,
    gene_columns,
    gene_names,
    genes_to_model,
    genes_with_values,
    layer_names,
    records,
    training_rows,
    write,
    write_record,
)

__all__ = [
    "UNFITTED",
    "UNS",
    "FeatureMetadata",
    "Fit",
    "GridPoints",
    "SectionData",
    "SectionImage",
    "SpatialDataView",
    "accepts_spatialdata",
    "add_metadata",
    "check_key",
    "compare_settings",
    "coordinates",
    "empty_object",
    "expression",
    "expression_finding",
    "factor_of",
    "factors_of",
    "features",
    "finite_features",
    "gene_columns",
    "gene_names",
    "genes_to_model",
    "genes_with_values",
    "is_spatialdata",
    "layer_names",
    "load_fit",
    "need_metadata",
    "new_object",
    "open_feature_image",
    "open_fit_image",
    "open_section_image",
    "pack",
    "plain_params",
    "points_obs",
    "rasterized",
    "read_fit",
    "read_fitted_sections",
    "read_metadata",
    "read_sections",
    "read_stained_sections",
    "record_findings",
    "records",
    "resolve_scale",
    "save_fit",
    "scale_sources",
    "section_findings",
    "section_rows",
    "spatial_entries",
    "spot_diameter",
    "stored_image",
    "to_anndata",
    "training_rows",
    "unpack",
    "with_features",
    "write",
    "write_domains",
    "write_features",
    "write_fit",
    "write_gene_test",
    "write_prediction",
    "write_record",
]

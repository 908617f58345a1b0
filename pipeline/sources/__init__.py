"""Sources: a user's data in any of the formats below, one reader per module, as classes, a shape and streams of images."""

from typing import Annotated

from pydantic import Field

from pipeline.sources.digits import DigitsParams
from pipeline.sources.imagefolder import ImageFolderParams
from pipeline.sources.npz import NpyParams, NpzParams
from pipeline.sources.parquet import ParquetParams
from pipeline.sources.rows import Rows, stratified
from pipeline.sources.source import Source, Split
from pipeline.sources.torchvision_sets import TorchvisionParams
from pipeline.sources.webdataset import WebDatasetParams

__all__ = ["Rows", "Source", "SourceParams", "Split", "open_source", "stratified"]

SourceParams = Annotated[
    DigitsParams | TorchvisionParams | ParquetParams | ImageFolderParams | WebDatasetParams | NpzParams | NpyParams,
    Field(discriminator="kind"),
]


def open_source(params: SourceParams) -> Source:
    """Open the source that params describe; images are read only when a split is streamed.

    Raises:
        InputError: the data is missing, damaged or not of the kind.
    """
    return params.open()

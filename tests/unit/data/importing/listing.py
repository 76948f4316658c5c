"""The items that are found in a data set, without packing them."""

from univitar_ds.data.importing.recognise import read_source
from univitar_ds.data.importing.rows import ReadOptions


def listed(source, **options):
    return read_source(source, ReadOptions(**options))


def texts_of(listing):
    return {row.file: row.captions or row.label for row in listing.rows}

from ..data import Images, index_batches, scale  # noqa: F401

from ..data import Data, ImageShape, load_data  # noqa: F401

"""Images: rows of a dataset (`dataset.py`), decoded to pixels (`decode.py`), cut into batches (`batches.py`)."""

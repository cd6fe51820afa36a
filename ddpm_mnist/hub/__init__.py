"""A model for other people: the exported folder, its card, and the upload."""

"""Measures of a model: distances between its samples and real images, and the bound on the likelihood."""

"""How good is a model: distances between sets of images, and the bound on the likelihood."""

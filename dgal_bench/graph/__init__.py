"""The nearest-neighbour graph on the features, and diffusion over it."""

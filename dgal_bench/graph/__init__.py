"""The nearest-neighbour graph on the latents, and diffusion over it."""

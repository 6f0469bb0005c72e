"""Diffusion Graph Active Learning (DGAL) against its rivals: accuracy, and what the query really costs."""

__version__ = "0.1.0"

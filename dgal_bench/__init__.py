"""Diffusion Graph Active Learning (DGAL) against its rivals: accuracy, and what the query really costs."""

import os

__version__ = "0.1.0"

# OpenMP's threads spin while they wait, and take the cores from whatever else runs: a VAE on two threads beside other
# work took 55.7 s, and 2.4 s where they sleep, with the same bits. Read when torch is imported, which is after this; in
# the environment for every process that is started from here. A user's own value stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

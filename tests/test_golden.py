"""Numbers that other machines' results rest on. When one changes, raise the version named beside it and renew it here.

Picks are integers and must be equal; what floating-point libraries may round differently has a tolerance.
"""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from dgal_bench.core.seeding import TieBreak, isolated, normals, rng_for, seed_for
from dgal_bench.data.pool import Pool, initial_set
from dgal_bench.graph.diffusion import diffuse
from dgal_bench.graph.knn import knn
from dgal_bench.graph.propagation import harmonic
from dgal_bench.graph.transition import attach, transition
from dgal_bench.models.vae import VaeModule
from dgal_bench.models.vae_nets import build_vae
from dgal_bench.representation import RECIPE_VERSION
from dgal_bench.results.resume import ALGORITHM_VERSION
from dgal_bench.strategies.base import Query
from dgal_bench.strategies.restrict import Diffusion, Uniform
from tests.loading import load
from tests.test_vae import config

GOLDEN = {
    "seed": 6151615330439519167,
    "initial": [105, 373, 159, 409, 62, 837, 503, 396, 576, 638],
    "ties": [478, 168, 246],
    "uniform": [44, 1242, 745, 354, 49],
    "diffusion": [266, 956, 1179, 1193, 1360],
    "edges": 38376,
    "heat": 35.48399,
    "converged": [183.9713, 116.8585, 166.3667],
    "attached": 31.3669,
    "vae": [13.492897, 0.009317379],
    "noise": [[-0.7093813, -1.1168392, 1.0704429], [0.7207967, -0.2793940, -3.3857808]],
}


class Clock:
    """Does not measure."""

    def phase(self, name):
        return nullcontext()


def pixels():
    return load("digits", Path("unused")).images.flatten(1).float()


def images_outside():
    return load("digits", Path("unused")).test_images.flatten(1).float()


def query():
    labels = load("digits", Path("unused")).labels
    first = initial_set(labels, 10, 10, seed=0)
    pool = Pool(len(labels), 10, first, labels[first])
    return Query(pool, None, None, rng_for(0, "query", 0), TieBreak(seed_for(0, "ties", 0), len(labels)), Clock())


def test_streams_and_picks_belong_to_algorithm_version():
    assert ALGORITHM_VERSION == 2
    asked = query()
    assert seed_for(0, "weights", 3) == GOLDEN["seed"]
    assert asked.pool.labeled.tolist() == GOLDEN["initial"]
    assert asked.ties(torch.arange(3)).tolist() == GOLDEN["ties"]
    assert Uniform(5)(asked).tolist() == GOLDEN["uniform"]
    assert sorted(Diffusion(transition(knn(pixels(), 20)), 5)(asked).tolist()) == GOLDEN["diffusion"]


def test_graph_loss_and_noise_belong_to_recipe_version():
    assert RECIPE_VERSION == 4
    graph = transition(knn(pixels(), 20))
    assert len(graph.indices) == GOLDEN["edges"]
    heat = diffuse(graph, torch.arange(10), torch.arange(10), 10, 3)
    assert np.allclose(float(heat.sum()), GOLDEN["heat"], rtol=1e-5)
    converged, _ = harmonic(graph, torch.arange(10), torch.arange(10), 10)
    assert np.allclose(converged.sum(0)[:3], GOLDEN["converged"], rtol=1e-4)
    attached = attach(knn(pixels(), 20), pixels(), images_outside())
    assert np.allclose(float(attached.weights.max(1).values.sum()), GOLDEN["attached"], rtol=1e-5)
    with isolated(0, "golden"), torch.no_grad():
        module = VaeModule(build_vae((1, 8, 8), 4, "cnn"), config(latent_dim=4), seed=0)
        error, kl, _ = module.losses(pixels()[:50].view(-1, 1, 8, 8) / 16, 0.0)
    assert np.allclose([float(error.mean()), float(kl.mean())], GOLDEN["vae"], rtol=1e-4)
    assert np.allclose(normals(5, torch.tensor([0, 59_999]), 3), GOLDEN["noise"], rtol=1e-6)

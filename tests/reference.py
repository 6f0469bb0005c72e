"""The criteria as their papers write them, dense and slow: what the fast ones must equal, and are timed against."""

import numpy as np


def badge(errors_NC, features_Nd, batch_size, rng):
    """Ash et al. (2020), Alg. 1: every gradient written out, every distance computed from it.

    One ``rng.random()`` a pick, or one ``rng.integers()`` where all distances are 0.
    """
    gradients = (errors_NC[:, :, None] * features_Nd[:, None, :]).reshape(len(errors_NC), -1)
    picks = [int(np.argmax(np.linalg.norm(gradients, axis=1)))]
    nearest = np.full(len(gradients), np.inf)
    while len(picks) < batch_size:
        nearest = np.minimum(nearest, ((gradients - gradients[picks[-1]]) ** 2).sum(axis=1))
        total = nearest.sum()
        if total > 0:
            picks.append(int(rng.choice(len(gradients), p=nearest / total)))
        else:
            left = np.setdiff1d(np.arange(len(gradients)), picks)
            picks.append(int(left[rng.integers(len(left))]))
    return picks


def k_center(features_Nd, centres_kd, batch_size):
    """Sener and Savarese (2018), Alg. 1: for every pick all distances to all centres, again."""
    picks = []
    while len(picks) < batch_size:
        centres = np.concatenate([centres_kd, features_Nd[picks]])
        radius = np.full(len(features_Nd), np.inf)
        for centre in centres:
            radius = np.minimum(radius, ((features_Nd - centre) ** 2).sum(axis=1))
        radius[picks] = -1
        picks.append(int(np.argmax(radius)))
    return picks

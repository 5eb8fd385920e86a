"""Gradients of a quadratic with known noise, measured as training does.

A helper of the tests of the pure rooms.
"""

import math

import numpy as np

from keras_batchsize.noise import MicroBatchNorms

# Eigenvalues over two orders of magnitude: effective rank 21 of 200.
SPREAD = 1.0 / np.arange(1.0, 201.0)


def norms_of_means(means, sizes):
    """The norms of one update, straight from their definitions.

    Args:
        means: Mean gradient of each micro-batch, one per row.
        sizes: Examples in each micro-batch.
    """
    shares = sizes / sizes.sum()
    before = np.arange(1, len(sizes))
    products = (means[1:] * means.cumsum(axis=0)[:-1]).sum(axis=1) / before
    return MicroBatchNorms(
        micro_sq_norm=float(shares @ np.square(means).sum(axis=1)),
        mean_sq_norm=float(np.square(shares @ means).sum()),
        examples=float(sizes.sum()),
        count=float(len(sizes)),
        products=float(before @ np.square(products)),
    )


def quadratic(spectrum, noise_scale, direction):
    """Returns G and √Σ with a given φ: per-example gradients are G + √Σ·z."""
    deviation = np.sqrt(spectrum)
    length = math.sqrt(spectrum.sum() / noise_scale)
    return length * direction / np.linalg.norm(direction), deviation


def measured(random, gradient, deviation, examples=1024, count=8):
    """The norms of one measurement; means of m Gaussians are Gaussians."""
    size = examples / count
    scatter = random.standard_normal((count, gradient.size)) * deviation
    means = gradient + scatter / math.sqrt(size)
    return norms_of_means(means, np.full(count, size))

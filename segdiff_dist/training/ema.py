"""Averages of the weights with power-function profiles, several at once, and any other length after training.

    average(t) = (gamma + 1) / t^(gamma + 1) * integral over tau in 0..t of tau^gamma * weights(tau)

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.1 and appendix C.
t counts images. A profile is named by its relative width sigma_rel, the standard deviation of tau / t: 0.05 averages
over about the last tenth of the run, however long the run has been.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# sigma_rel of the widest possible profile: gamma = 0, the mean of all weights.
WIDEST = 1 / math.sqrt(12)


def name_of(length: float) -> str:
    """The folder of an average under weights/ and snapshots/."""
    return f"ema_{length:g}"


def exponent(length: float) -> float:
    """gamma of a profile of relative width `length` (sigma_rel, in (0, WIDEST]); equation 126, solved for gamma."""
    # sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)): one real root of a cubic is positive or zero.
    inverse = length**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(max(root.real for root in roots if abs(root.imag) < 1e-9)))


def decay(length: float, images_seen: int, images: int) -> float:
    """The factor of the old average in a step of `images` images that ends at `images_seen`; equation 2 of section 3.1:
    (1 - images / images_seen)^(gamma + 1), so 0 in the first step."""
    return float((1.0 - images / images_seen) ** (exponent(length) + 1.0))


def reconstruct(stored: Sequence[tuple[float, int]], wanted: tuple[float, int]) -> np.ndarray:
    """The coefficient of each stored average: float64 [len(stored)], with sum 1.

    An average is (length, images_seen when it was taken). The combination is the one whose profile is nearest to the
    wanted one, in the least-squares sense (appendix C.2, algorithm 3). A sum of 1 is an additional condition, since a
    sum that is off by a thousandth changes all weights by a thousandth.
    """
    gammas_N, times_N = _profiles(stored)
    gamma, time = _profiles([wanted])
    A_NN = _inner_product(times_N[:, None], gammas_N[:, None], times_N[None], gammas_N[None])
    b_N = _inner_product(times_N, gammas_N, time, gamma)
    ones_N1 = np.ones((len(b_N), 1))
    # Lagrange's condition: A w + lambda = b, sum w = 1.
    system = np.block([[A_NN, ones_N1], [ones_N1.T, np.zeros((1, 1))]])
    scale = np.sqrt(np.append(np.diag(A_NN), 1.0))  # late averages have far narrower profiles than early ones
    solved = np.linalg.lstsq(system / np.outer(scale, scale), np.append(b_N, 1.0) / scale, rcond=None)[0]
    return (solved / scale)[:-1]


def misfit(stored: Sequence[tuple[float, int]], wanted: tuple[float, int]) -> float:
    """Distance of the best combination's profile from the wanted one: 0 exact, 1 as far as without any average."""
    w_N = reconstruct(stored, wanted)
    gammas_N, times_N = _profiles(stored)
    gamma, time = _profiles([wanted])
    A_NN = _inner_product(times_N[:, None], gammas_N[:, None], times_N[None], gammas_N[None])
    b_N = _inner_product(times_N, gammas_N, time, gamma)
    of_wanted = float(_inner_product(time, gamma, time, gamma)[0])
    squared = float(w_N @ A_NN @ w_N - 2 * w_N @ b_N) / of_wanted + 1.0
    return math.sqrt(max(0.0, squared))


def _profiles(averages: Sequence[tuple[float, int]]) -> tuple[np.ndarray, np.ndarray]:
    """gamma and time of each, float64."""
    return np.array([exponent(length) for length, _ in averages]), np.array([float(t) for _, t in averages])


def _inner_product(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Scalar product of two profiles, over all tau; appendix C.2, equation 137 and following."""
    power = np.where(t_a < t_b, gamma_b, -gamma_a)
    overlap = (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** power
    return overlap / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))

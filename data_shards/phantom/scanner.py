"""Scanners: the signal of tissues in CT and in MR, and the effects of the machine (table, noise, bias field, scale)."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from data_shards.phantom.canvas import Canvas, Tissue
from data_shards.phantom.patient import Grid

AIR_HU = -1000.0
# Mean HU and texture, portal-venous phase, about 70 s after contrast: rounded from everyday radiology, and spread
# where two neighbours would otherwise look the same.
_CT: dict[str, tuple[float, float]] = {
    "air": (AIR_HU, 0.0), "gas": (-920.0, 20.0), "lung": (-820.0, 45.0), "skin": (20.0, 8.0), "fat": (-102.0, 7.0),
    "muscle": (56.0, 9.0), "heart": (135.0, 6.0), "bone": (420.0, 60.0), "marrow": (190.0, 35.0), "disc": (80.0, 8.0),
    "canal": (25.0, 5.0), "artery": (168.0, 3.0), "vein": (146.0, 4.0), "wall": (78.0, 6.0), "chyme": (-8.0, 22.0),
    "adrenal": (82.0, 4.0), "kidney_cortex": (208.0, 7.0), "kidney_medulla": (182.0, 9.0), "bile": (8.0, 2.0),
    "pancreas": (92.0, 8.0), "stomach_fluid": (22.0, 6.0), "oesophagus": (50.0, 5.0), "duodenal_fluid": (42.0, 7.0),
    "spleen": (130.0, 5.0), "liver": (112.0, 5.0), "liver_vessel": (148.0, 4.0), "genital": (72.0, 8.0),
    "urine": (4.0, 2.0),
}  # fmt: skip
# How far a patient's enhancement may be from the mean: contrast dose, timing, heart.
_ENHANCEMENT_RANGE = (0.93, 1.07)

# Proton density and T2 (ms), near the 1.5 T values of de Bazelaire et al. 2004 (Radiology 230:652), spread where
# two neighbours would look the same; flowing blood gives no signal in spin echoes, fat is long in fast ones.
_MR: dict[str, tuple[float, float]] = {
    "air": (0.0, 100.0), "gas": (0.02, 40.0), "lung": (0.10, 40.0), "skin": (0.7, 40.0), "fat": (1.0, 260.0),
    "muscle": (0.95, 30.0), "heart": (0.55, 45.0), "bone": (0.10, 40.0), "marrow": (0.80, 70.0), "disc": (0.8, 60.0),
    "canal": (1.0, 900.0), "artery": (0.06, 100.0), "vein": (0.12, 100.0), "wall": (0.9, 42.0), "chyme": (0.8, 50.0),
    "adrenal": (0.90, 36.0), "kidney_cortex": (0.92, 92.0), "kidney_medulla": (0.95, 104.0), "bile": (1.0, 700.0),
    "pancreas": (0.92, 62.0), "stomach_fluid": (1.0, 600.0), "oesophagus": (0.92, 42.0), "duodenal_fluid": (1.0, 380.0),
    "spleen": (0.95, 84.0), "liver": (0.85, 48.0), "liver_vessel": (0.2, 100.0), "genital": (0.95, 80.0),
    "urine": (1.0, 1200.0),
}  # fmt: skip
_MR_TEXTURE_SHARE = 0.04
_ECHO_TIME_RANGE_MS = (52.0, 66.0)
_MR_SCALE_RANGE = (400.0, 3000.0)


def ct_tissues(rng: np.random.Generator) -> dict[str, Tissue]:
    """HU of each tissue for one patient; soft tissue is scaled by how well the contrast agent enhanced it."""
    enhancement = float(rng.uniform(*_ENHANCEMENT_RANGE))
    jitter = dict(zip(_CT, rng.normal(0.0, 2.5, len(_CT)), strict=True))
    tissues = {}
    for name, (mean, texture) in _CT.items():
        scale = enhancement if 60.0 < mean < 300.0 else 1.0
        tissues[name] = Tissue(mean * scale + (0.0 if name == "air" else float(jitter[name])), texture)
    return tissues


def mr_tissues(rng: np.random.Generator) -> dict[str, Tissue]:
    """Relative signal of each tissue in a single-shot fast spin echo: density * exp(-TE / T2), TE drawn per patient."""
    echo_time_ms = float(rng.uniform(*_ECHO_TIME_RANGE_MS))
    jitter = dict(zip(_MR, rng.normal(1.0, 0.03, len(_MR)), strict=True))
    tissues = {}
    for name, (density, t2_ms) in _MR.items():
        signal = float(density * np.exp(-echo_time_ms / (t2_ms * jitter[name])))
        tissues[name] = Tissue(signal, _MR_TEXTURE_SHARE * signal)
    return tissues


def scan_ct(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """HU [X, Y, Z] int16: painted tissues on a scanner table, with texture and correlated noise of 9 to 13 HU."""
    image = canvas.image
    _add_table(image, canvas.grid)
    image += canvas.texture * _smooth_noise(rng, canvas.grid, 5.0)
    noise = ndimage.gaussian_filter(rng.standard_normal(image.shape, np.float32), (0.55, 0.55, 0.0), truncate=3.0)
    image += noise * float(rng.uniform(9.0, 13.0) / noise.std())
    # A scanner stores nothing below -1024 HU.
    return np.clip(np.rint(image), -1024.0, 3071.0).astype(np.int16)


def scan_mr(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Arbitrary units [X, Y, Z] int16: signal under a smooth coil sensitivity, Rician noise, a scale per patient."""
    signal = canvas.image + canvas.texture * _smooth_noise(rng, canvas.grid, 5.0)
    signal *= _bias_field(rng, canvas.grid)
    sigma = float(rng.uniform(0.018, 0.028))
    real = signal + sigma * rng.standard_normal(signal.shape, np.float32)
    imaginary = sigma * rng.standard_normal(signal.shape, np.float32)
    magnitude = np.hypot(real, imaginary)
    # Log-uniform: scales of archives spread over an order of magnitude.
    low, high = np.log(_MR_SCALE_RANGE)
    scale = float(np.exp(rng.uniform(low, high)))
    return np.rint(magnitude * (scale / float(magnitude.max()))).astype(np.int16)


def _add_table(image: np.ndarray, grid: Grid) -> None:
    """A hollow curved couch under the back; part of the scanner, so it does not turn with the patient."""
    x, y, _ = grid.axes()
    in_body = (image > -300.0).any(axis=(0, 2))
    back_mm = float(y[0, int(np.argmax(in_body)), 0]) - 3.0
    top = back_mm + x[:, :, 0] ** 2 * (1.0 / 1600.0)
    below = top - y[:, :, 0]
    width = np.abs(x[:, :, 0]) < 185.0
    table = np.where((below > 0.0) & (below < 22.0) & width, -860.0, AIR_HU)
    shell = (np.abs(below - 2.0) < 2.5) | (np.abs(below - 20.0) < 2.5)
    table = np.where(shell & width, -180.0, table).astype(np.float32)
    np.maximum(image, table[:, :, None], out=image)


def _smooth_noise(rng: np.random.Generator, grid: Grid, correlation_mm: float) -> np.ndarray:
    """Unit-variance noise [X, Y, Z] that varies over about `correlation_mm`, as parenchyma does."""
    sigmas = [correlation_mm / (2.0 * s) for s in grid.spacing_mm]
    noise = ndimage.gaussian_filter(rng.standard_normal(grid.shape, np.float32), sigmas, truncate=3.0)
    return np.asarray(noise * float(1.0 / noise.std()))


def _bias_field(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    """Coil sensitivity [X, Y, Z]: a few long waves, about +-15 %."""
    log_field = np.zeros(grid.shape, np.float32)
    for _ in range(3):
        waves = [
            np.cos(axis * float(rng.uniform(0.004, 0.011)) + float(rng.uniform(0.0, 2.0 * np.pi)))
            for axis in grid.axes()
        ]
        log_field += (waves[0] * float(rng.normal(0.0, 0.09))) * waves[1] * waves[2]
    return np.exp(log_field)

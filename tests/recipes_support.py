"""What the tests of the denoiser's recipes share."""

from __future__ import annotations

from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.schedule import make_scheduler

ALPHAS_CUMPROD = make_scheduler(DiffusionConfig()).alphas_cumprod
LIVER, SPLEEN = 6, 1

"""The autoencoder: slices to latents of fewer positions, on which a denoiser may work (Rombach et al. 2022)."""

"""The denoiser: from a noised slice and its mask to the slice."""

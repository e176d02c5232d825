"""Output for other software: sample stores as data sets, a model as a diffusers folder, whole volumes."""

"""What others read: sample stores as data sets, a model as a diffusers folder, whole volumes."""

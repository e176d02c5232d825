"""What generated images are good for: segmenters trained with and without them, tested on real ones."""

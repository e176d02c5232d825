"""The use of generated images: segmenters trained with and without them, and tested on real ones."""

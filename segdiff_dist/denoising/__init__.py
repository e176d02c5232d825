"""The painter: a noised slice and its mask to the slice."""

"""NIfTI volumes to slices: read, checked, labelled, cut; `prepare` does all of it and writes a shard set."""

"""Whatever is learned from the shards: one loop, on any number of ranks."""

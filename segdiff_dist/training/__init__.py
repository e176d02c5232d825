"""Training on shards: one loop for every network, on any number of ranks."""

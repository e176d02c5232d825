"""A data set and the hours there are, made into a configuration: recipe, batches, workers and lengths."""

"""Numbers to MLflow, by way of a queue on disk."""

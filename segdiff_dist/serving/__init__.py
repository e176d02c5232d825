"""Painting as a service: an HTTP interface, models behind Ray Serve, and batches across requests. docs/serve.md."""

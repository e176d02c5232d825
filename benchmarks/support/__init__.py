"""Shared code of the benchmarks. The scripts import it as `support`, since Python puts their folder first."""

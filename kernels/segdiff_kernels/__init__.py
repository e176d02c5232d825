"""Triton kernels, each beside its torch reference. Importing this needs neither Triton nor a GPU."""

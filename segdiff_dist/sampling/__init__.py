"""Masks to images, on Ray."""

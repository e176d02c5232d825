"""Slices on disk and behind URLs: written, found again, checked, converted, looked at."""

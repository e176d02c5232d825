"""Slices on disk and behind URLs: writing, reading, checks, conversion, inspection."""

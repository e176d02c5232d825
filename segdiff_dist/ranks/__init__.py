"""The processes of one run, and what they know of each other."""

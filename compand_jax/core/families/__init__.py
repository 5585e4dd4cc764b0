"""Families of levels: each a file, with what they have in common in `base`."""

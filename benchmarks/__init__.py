"""Measurements behind the claims: one command each, listed in README.md."""

"""Builds what readers read from results/: so far the README."""

"""Plumbing that the lessons share: data, training loop, experiments, statistics, tables, plots, command line."""

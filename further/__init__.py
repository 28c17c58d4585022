"""Deeper questions behind the lessons, a script each: `python -m further.monte_carlo_dropout`."""

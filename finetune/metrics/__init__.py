"""Scores, one function each, and their intervals."""

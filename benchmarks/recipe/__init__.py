"""Comparisons of training recipes."""

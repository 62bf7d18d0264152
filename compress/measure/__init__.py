"""Measuring models: how good, how large, how fast, and whether a difference is real."""

"""Hyper-parameter search with Ray Tune (the Tune issue)."""

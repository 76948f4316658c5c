"""Weights carried to and from the layouts of others."""

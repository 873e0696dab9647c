"""Measurements of kernels, steps, data and overhead."""

"""Predictions against measurements: published training runs and single kernels."""

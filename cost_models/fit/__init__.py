"""Fits the constants of `constants/*.toml` on measured kernels and on published training runs."""

"""Runs bundles: prompt in, pictures out, with LiteRT and numpy. Never imports torch."""

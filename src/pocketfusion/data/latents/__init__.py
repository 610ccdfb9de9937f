"""Caches of latents: written by parts as pictures stream by, opened without the pictures."""

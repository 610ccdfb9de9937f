"""Scores of generated pictures beside those of real ones (the ceiling) and of shuffled captions (the floor)."""

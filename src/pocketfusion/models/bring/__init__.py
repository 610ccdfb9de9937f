"""Checkpoints as others keep them, single files and the Hub's repositories, turned into model folders or refused."""

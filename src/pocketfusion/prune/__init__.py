"""Structured pruning of a UNet: which units go, what that does, and the folder without them."""

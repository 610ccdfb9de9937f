"""Weights in fewer bits: their forms, how much each layer bears, and a choice per layer under a budget."""

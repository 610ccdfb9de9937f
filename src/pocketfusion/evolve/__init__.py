"""Evolving the architecture: SnapFusion's Algorithm 1, block values, and the removals it is compared with."""

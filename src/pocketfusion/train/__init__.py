"""Training: one loop on accelerate; each stage is a small task passed to it."""

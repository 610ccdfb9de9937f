"""Distillation: the DDIM algebra once, and the stages that take steps, guidance and decoder width away."""

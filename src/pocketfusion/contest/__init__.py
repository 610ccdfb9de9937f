"""Runtimes against each other: one UNet on all that this machine has, the same pictures in turns (`bench --all`)."""

"""What a port of the runtime needs: reference values to compare with, and what carries a bundle to a stranger's phone."""

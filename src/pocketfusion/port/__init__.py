"""What a port of the runtime needs: reference values to compare with, and a way to a stranger's phone and back."""

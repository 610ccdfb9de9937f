"""Measures of drawn pictures, and the commands that take them: a sub-package each."""

"""Samplers in numpy: each is a table of linear steps, which a port only has to multiply out."""

"""Variational inference: objectives are expectations of what a program says of another one's traces."""

"""Packed weights: what is kept of a pruned matrix, and the codes that say where."""

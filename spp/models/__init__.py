"""Models: which weights of an architecture are targets, their layout, and their names on disk."""

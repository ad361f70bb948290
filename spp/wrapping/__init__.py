"""Wrapping: adapters put into a model, taken out of it, saved and loaded."""

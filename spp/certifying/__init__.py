"""Certificates: what the zeros of a checkpoint are, written beside it, and verified."""

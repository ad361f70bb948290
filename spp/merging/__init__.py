"""Merging: an adapter's change put into the base weights, in memory and from disk to disk, with every zero kept."""

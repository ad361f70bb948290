"""Masks: patterns and bits, and the methods that choose which weights stay, as pure functions on tensors."""

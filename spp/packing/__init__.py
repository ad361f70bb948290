"""Packing: pruned models and checkpoints stored at the size of what was kept, and back."""

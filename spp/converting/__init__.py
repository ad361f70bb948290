"""Checkpoints and masks that other tools wrote, made dense checkpoints with exact zeros."""

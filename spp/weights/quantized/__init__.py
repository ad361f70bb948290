"""Quantized weights as bitsandbytes and torchao store them, read a block at a time."""

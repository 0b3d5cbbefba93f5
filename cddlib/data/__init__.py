"""Data sets as tensors, what a network sees of them, and how they are augmented."""

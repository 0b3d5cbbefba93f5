"""Figures, a file a chapter, in one style."""

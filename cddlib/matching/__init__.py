"""The heart: segments, students, the matching loss and its exact gradient."""

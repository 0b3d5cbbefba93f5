"""The outer loop: K gradients an iteration, and everything around them."""

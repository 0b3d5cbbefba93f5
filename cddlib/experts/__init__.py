"""Expert trajectories: training them, and the buffer that keeps them."""

"""Training: the state, the step, the loop, and what a run leaves on disk."""

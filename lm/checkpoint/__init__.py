"""The state of a run on disk: saved beside training, trusted only after a check, restored on whatever is there."""

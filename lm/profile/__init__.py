"""What a trace of the profiler says: where the time of a step went, and what to try."""

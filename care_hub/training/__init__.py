"""Training: the loop, the run folder, the methods, and what a run says of itself."""

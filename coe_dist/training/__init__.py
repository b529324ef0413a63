"""Training: engines, one step, evaluation, checkpoints, and the function every worker process runs."""

"""Ray: run the worker function on one machine or a cluster, watch it, end everything that was started."""

"""Linear probes: targets, controls, solvers and files. Uses `rows` and `support`."""

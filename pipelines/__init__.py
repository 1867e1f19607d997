"""Jobs from end to end, and the command line: the only room in which `capture` and `analysis` meet. Uses all rooms."""

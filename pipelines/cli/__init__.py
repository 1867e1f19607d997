"""The command line: one file a command, shared options, what is printed, progress bars. Uses all rooms and folders."""

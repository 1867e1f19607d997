"""The command line: one file a command, options, report and progress. Uses everything."""

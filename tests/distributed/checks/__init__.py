"""What is checked on each rank of a layout besides plain taps: captures, jobs, refusals, replays, restoration."""

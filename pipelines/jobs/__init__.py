"""The processes of a launch: how they find each other, share work and stop in time. Uses `setup` and below."""

"""The processes of a launch: rendezvous, shared work, stopping. Uses `setup` and below."""

"""What `pagedlit bench` runs: measurements against the alternatives, in the same process, on any machine."""

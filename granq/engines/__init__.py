"""Engine files: what this machine is, what a manifest demands, and whether the two fit. Needs no server and no GPU."""

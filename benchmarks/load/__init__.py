"""What being a service costs: joint training, transfers, start-up, and a coordinator under load."""

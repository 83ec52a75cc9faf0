"""What all services share: server, jobs, artifacts, errors, settings; and, for those with PyTorch, model intake."""

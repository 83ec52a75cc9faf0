"""Long measurements, one command for each table; results are kept under benchmarks/results/."""

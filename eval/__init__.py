"""What to measure, and the measured tables in `results/`."""

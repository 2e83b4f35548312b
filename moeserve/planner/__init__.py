"""What this machine can do, and what a deployment on it would reach."""

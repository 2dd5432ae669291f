"""What scripts/gpu_check.sh measures on a GPU."""

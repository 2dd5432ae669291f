"""What people run, and what their tools share."""

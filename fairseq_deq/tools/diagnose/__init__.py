"""One command, one page: what a trained model's equilibrium is like, and what its options would buy."""

"""A training step through the equilibrium layer, beside its peers."""

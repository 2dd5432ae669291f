"""Generation from cached equilibria, beside a stack of layers."""

"""The cells whose equilibrium is the model, and what they are made of."""

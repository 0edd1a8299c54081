"""Step tables, probabilities, plans and the one-process integrator."""

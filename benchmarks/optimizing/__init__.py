"""Compares what our optimizer makes of a model with what users do today: speed, fidelity, and promises kept."""

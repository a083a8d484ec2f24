"""Bits for every layer: what a network costs, the integer program, its policies, sensitivities of the methods."""

"""Finds the nodes that have the weights, copies weights to more nodes, and keeps them there."""

"""Choosing a plan: mesh, schedule and partition for a model on a machine. Imports no JAX."""

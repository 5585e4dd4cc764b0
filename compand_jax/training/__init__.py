"""Jitted steps, fitting, checkpoints, many devices."""

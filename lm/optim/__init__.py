"""Optimizers and schedules, built on optax."""

"""Pretraining of decoder-only transformer language models with JAX and Flax."""

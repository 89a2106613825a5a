"""What runs have done, read from their directories alone: one that goes on, several compared, their curves."""

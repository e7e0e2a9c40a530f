"""Many related systems, one after the other."""

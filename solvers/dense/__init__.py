"""Dense factorisations."""

"""Whole tasks, from data to a recorded run."""

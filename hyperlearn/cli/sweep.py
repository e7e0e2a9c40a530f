"""``hyperlearn sweep``: a grid of runs on several processes."""

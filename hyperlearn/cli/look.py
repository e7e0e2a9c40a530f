"""``hyperlearn show``, ``list``, ``compare``, ``export``, ``recover``, ``schema``."""

"""Everything that can be validated here: about an hour, most of it training.

python -m validation
"""

from __future__ import annotations

from validation import cleaning, hypergradients

if __name__ == "__main__":
    sound = hypergradients.main()
    cleaning.main(["table"])
    raise SystemExit(0 if sound else 1)

"""Everything that can be validated here: over an hour, most of it training.

python -m validation
"""

from __future__ import annotations

from validation import cleaning, hypergradients, relaxation, zoo

if __name__ == "__main__":
    sound = hypergradients.main()
    sound = zoo.main([]) and sound
    cleaning.main(["table"])
    relaxation.main([])
    raise SystemExit(0 if sound else 1)

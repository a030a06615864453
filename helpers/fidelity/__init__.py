"""03: predictions against full precision, and what formats do to weights."""

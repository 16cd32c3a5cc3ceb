"""Accepts or refuses a candidate, picks the lever, makes the next harness."""

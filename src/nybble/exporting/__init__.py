"""Merging a run's adapter into its base, writing the result in the forms others read, and verifying it."""

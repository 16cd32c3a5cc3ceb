"""Runs a version of the agent in a sandbox."""

"""Writes the first versions of an agent."""

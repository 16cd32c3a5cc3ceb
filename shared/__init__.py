"""What every service knows: events, records, the fold of a run, ports, replay, settings."""

"""SIA on events: an agent improves itself through its harness and its weights, and every step is an event."""

"""The one door to every model: metered, recorded, replayable."""

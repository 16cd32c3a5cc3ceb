"""Checks and times kernels that somebody else wrote: `measure.measure` judges one, `report.render` prints several."""

"""Speed of this machine and effect of the method: `measure(run)` of a benchmark gives one dictionary a measurement."""

"""How fast this machine does what the package does: each module has `measure(run)` → one dictionary a measurement."""

"""Benchmarks of speed and tables of results.

`unidetox bench` runs decode, train and evaluate, whose `measure(run)` gives a dictionary per measurement; `python -m`
runs effect, comparison, precision and meshes.
"""

"""The report's parts as pure functions: figures and changes, plots, the page, the tables for a paper and a terminal."""

from unidetox_jax.reporting import findings, page, plots, results, tables

__all__ = ["findings", "page", "plots", "results", "tables"]

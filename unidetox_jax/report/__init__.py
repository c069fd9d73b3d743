"""The report as pure functions: results and their changes, findings, plots, tables and the page that holds them."""

from unidetox_jax.report import findings, page, plots, results, tables

__all__ = ["findings", "page", "plots", "results", "tables"]

"""The report as pure functions: results and their changes, findings, plots, tables and the page that holds them."""

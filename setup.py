"""For tools that look for a setup.py; everything about the distribution stands in pyproject.toml."""

from setuptools import setup

setup()

"""Packaging lives in pyproject.toml; this file lets tools that expect a setup.py find it."""

from setuptools import setup

setup()

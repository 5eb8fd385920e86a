"""Entry point for build tools; everything is declared in setup.cfg."""

import setuptools

setuptools.setup()

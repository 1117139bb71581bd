"""The packages of the wheel: those found in fastmlp/, and the kernels, which lie beside it."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["fastmlp", "fastmlp.*"]), "fastmlp.kernels"])

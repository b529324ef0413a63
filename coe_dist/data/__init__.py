"""Data: sources are written once as FFCV files (.beton) with a side-car each; training reads only those.

Importing this package loads nothing heavy; loader.py and writer.py import FFCV (and with it torch and numba).
"""

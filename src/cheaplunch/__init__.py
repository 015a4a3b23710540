"""cheaplunch: a promptable medical segmentation model from a handful of labelled slices."""

__version__ = "0.1.0"

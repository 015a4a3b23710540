"""cheaplunch: a promptable medical segmentation model from a handful of labelled slices."""

"""Masks in, figures out: `metrics` measures, `protocols` scores, `tables` sums up. Knows no model."""

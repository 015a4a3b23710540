"""From files to slices and back: no model is known here."""

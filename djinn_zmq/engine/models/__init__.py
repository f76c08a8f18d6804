"""Models: loaded, checked, taken apart at their layers, and the arithmetic on what comes out of these."""

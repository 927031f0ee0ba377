"""Which layers approximate and how, under a budget: measured on calibration text, verified as a whole (issue 7, section 2)."""

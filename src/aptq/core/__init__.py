"""Numbers only: grids, rounding, packed parts, plans, the column sweep.  Needs torch alone."""

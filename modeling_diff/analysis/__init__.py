"""Looking at attention, and measuring it: maps, heads, needles, outliers. Never in the bundle."""

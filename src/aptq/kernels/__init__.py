"""y = x @ weight.T for one part; dispatch chooses the first kernel that supports it."""

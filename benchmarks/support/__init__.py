"""What the benchmarks share. Scripts beside this folder import it as `support`: Python puts their folder first."""

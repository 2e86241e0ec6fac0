"""The convergence ladder: what a recipe can learn, from one batch upwards; it stops at the first rung that fails."""

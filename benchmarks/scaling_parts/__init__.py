"""How the cost of a step grows: simulated memory and traffic, measured time."""

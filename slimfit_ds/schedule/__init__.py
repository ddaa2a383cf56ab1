"""When it trains: policies, update statistics, the budget of an active set, and the schedule."""

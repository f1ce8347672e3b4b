"""Planning how a model is served: decisions, search, the plan and what it says."""

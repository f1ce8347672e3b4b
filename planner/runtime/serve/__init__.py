"""Serve a plan: the user's own model, its weights in their formats, on their tiers."""

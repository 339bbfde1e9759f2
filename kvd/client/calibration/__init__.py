"""Making a profile: what a model's KV looks like, and how much of it each level may lose."""

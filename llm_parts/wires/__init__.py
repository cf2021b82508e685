"""Wire formats: what each provider is sent and what comes back, and nothing of when, how often or at what cost."""

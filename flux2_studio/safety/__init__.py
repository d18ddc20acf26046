"""Safety checks: rules for prompts, classifiers for pictures, and a policy for the consequences.

Runs use `guard.SafetyGuard`; the other modules serve it.
"""

"""What is drawn and from what: rules for prompts, a classifier for pictures, and a policy that says what follows.

`guard.Guard` is what a run uses; all else here is of use to it alone.
"""
